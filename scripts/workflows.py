"""Makes the UI workflows and their thumbnails from workflows/api/*.json, with ComfyUI's own front end in Chromium.

    bash scripts/environment.sh --test
    COMFYUI_PATH=$(bash scripts/comfyui.sh) .venv/bin/python -m scripts.workflows

workflows/api/*.json is the source of what runs, workflows/notes/*.md of what is said about it, workflows/inputs/ holds
the files that they read, as they lie in ComfyUI's input folder. Added here is what else a reader needs: groups, and
where the published files are. Sizes and widgets are the front end's: only it knows them.
"""

import asyncio
import json
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath

import aiohttp
from PIL import Image
from playwright.async_api import async_playwright

from sana_core.published import PUBLISHED, describe_size

from .demo import OUTPUT, Server, Status, free_port, queue_workflow, wait_for_images

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
CHROMIUM = "/usr/bin/chromium"
THUMBNAIL = 512  # pixels a side
FILES = """ComfyUI marks the loaders whose file is missing and offers the download. So does the node
*Download Sana Model*; by hand:

| File | Folder |
| --- | --- |
{rows}

**Terms.** Gemma is under Google's Gemma Terms of Use. For the Sana weights the model cards name an NVIDIA licence,
while licence files in some of the repositories say Apache-2.0: read the page of the file that you use.
"""

GROUPS = [  # title, colour, nodes by their title in the API file; one column each, from the left
    (
        "Models",
        "#3f789e",
        ["Transformer", "LoRA", "Perturbed attention", "ControlNet", "Text encoder", "Autoencoder"],
    ),
    ("Train it", "#785a9e", ["Data set", "Trainer", "Loss"]),
    ("What to draw", "#8a8", ["Prompts", "Prompt", "Negative prompt", "Size"]),
    (
        "What to start from",
        "#a86",
        ["Image", "Scale the image", "Scale the mask", "Encode", "Draw anew", "Apply ControlNet"],
    ),
    ("Draw it", "#b06634", ["Sampler"]),
    ("The picture", "#88a", ["Decode", "Keep the rest", "Picture"]),
]

# Places the nodes of an API workflow in columns, one group each, and returns the graph as the front end saves it.
LAY_OUT = """
async ({ name, api, groups, note, models, id }) => {
  const GAP = 30, TITLE = LiteGraph.NODE_TITLE_HEIGHT, HEADER = 50, WIDTH = 330;
  // With room for previews.
  const LEAST_HEIGHT = { SanaPromptEncode: 260, SanaSampler: 520, SaveImage: 400, LoadImage: 400, SanaDataset: 330,
    LossGraphNode: 300 };
  await app.loadApiJson(api, name);
  const graph = app.graph;
  const byTitle = new Map(graph.nodes.map((node) => [api[node.id]._meta.title, node]));
  let x = 0;
  groups = groups.map(([title, color, members]) => [title, color, members.filter((member) => byTitle.has(member))]);
  groups = groups.filter(([, , members]) => members.length);
  for (const [index, [title, color, members]] of groups.entries()) {
    let y = HEADER + TITLE;
    for (const member of members) {
      const node = byTitle.get(member);
      node.title = member;
      node.pos = [x + GAP, y];
      node.setSize([WIDTH, Math.max(node.computeSize()[1], LEAST_HEIGHT[node.type] ?? 0)]);
      y += node.size[1] + TITLE + GAP;
      for (const widget of node.widgets ?? [])
        if (widget.name === "control_after_generate") widget.value = "fixed";
      if (models[member]) node.properties.models = [models[member]];
      byTitle.delete(member);
    }
    const group = new LiteGraph.LGraphGroup(`${index + 1}. ${title}`);
    group.color = color;
    group.pos = [x, 0];
    group.size = [WIDTH + 2 * GAP, y - TITLE];
    graph.add(group);
    x += WIDTH + 3 * GAP;
  }
  if (byTitle.size) throw new Error(`no group for ${[...byTitle.keys()]}`);
  const reader = LiteGraph.createNode("MarkdownNote");
  graph.add(reader);
  reader.title = "Read me";
  reader.widgets[0].value = note;
  reader.pos = [-420 - GAP, TITLE];
  reader.setSize([420, 560]);
  return JSON.stringify({ ...graph.serialize(), id, revision: 0, extra: {} });
}
"""


async def draw(session, server, api):
    """Runs an API workflow; returns the path of its picture."""
    client_id = uuid.uuid4().hex
    async with session.ws_connect(f"{server.address}/ws?clientId={client_id}", max_msg_size=0) as socket:
        prompt_id = await queue_workflow(session, server, api, client_id)
        return (await wait_for_images(socket, prompt_id, api, Status()))[0]


def save_thumbnail(source, target):
    """Saves the middle square of a picture as a small JPEG."""
    with Image.open(source) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(target, quality=88)


def published_files(api):
    """The published files that an API workflow names, by the title of the node that loads them."""
    files = {file.filename: file for file in PUBLISHED.values()}
    named = ((node["_meta"]["title"], value) for node in api.values() for value in node["inputs"].values())
    return {title: files[value] for title, value in named if isinstance(value, str) and value in files}


def note_of(name, files):
    """The text of a workflow's note, with a table of its files in the place of {files}."""
    rows = "\n".join(
        f"| [{PurePosixPath(file.path).name}]({file.url}) ({describe_size(file.size)}), saved as `{file.filename}` "
        f"| `models/{file.folder}` |"
        for file in files.values()
    )
    text = (WORKFLOWS / "notes" / f"{name}.md").read_text(encoding="utf-8")
    return text.replace("{files}\n", FILES.format(rows=rows))


async def open_front_end(playwright, server):
    """Opens ComfyUI's page in Chromium and returns it."""
    browser = await playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    )
    page = await browser.new_page(viewport={"width": 2400, "height": 1300})
    await page.goto(server.address)
    await page.wait_for_function("window.app?.isGraphReady", timeout=60_000)
    return page


def model_entry(file):
    """What the front end reads of a loader's file to offer its download."""
    return {"name": file.filename, "url": file.url, "directory": file.folder}


async def author(page, name, api, files):
    """Writes the UI workflow of an API workflow; returns the screenshot of its graph."""
    arguments = {
        "name": name,
        "api": api,
        "groups": GROUPS,
        "note": note_of(name, files),
        "models": {title: model_entry(file) for title, file in files.items()},
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
    }
    graph = json.loads(await page.evaluate(LAY_OUT, arguments))
    target = WORKFLOWS / f"{name}.json"
    target.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    await page.evaluate("graph => app.loadGraphData(graph, true, true, 'check')", graph)
    await page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    await page.wait_for_timeout(1500)  # the view glides there
    await page.evaluate("() => { for (const node of app.graph.nodes) node.has_errors = false; app.canvas.draw(true) }")
    screenshot = OUTPUT / f"{name}_graph.png"
    await page.screenshot(path=screenshot)
    print(f"{target} (its graph: {screenshot})")
    return screenshot


async def main():
    shutil.copytree(WORKFLOWS / "inputs", Path(os.environ["COMFYUI_PATH"]) / "input", dirs_exist_ok=True)
    with Server(Path(os.environ["COMFYUI_PATH"]), free_port(8188)) as server:
        async with aiohttp.ClientSession() as session, async_playwright() as playwright:
            await server.wait_until_up(session, Status())
            # A first visitor's tutorial would cover the graph.
            await session.post(f"{server.address}/api/settings/Comfy.TutorialCompleted", json=True)
            page = await open_front_end(playwright, server)
            for path in sorted((WORKFLOWS / "api").glob("*.json")):
                api = json.loads(path.read_text(encoding="utf-8"))
                files = published_files(api)
                picture = await author(page, path.stem, api, files)
                if not files:  # nothing to download: the thumbnail shows what the workflow draws
                    picture = await draw(session, server, api)
                save_thumbnail(picture, path.parents[1] / f"{path.stem}.jpg")
            await page.context.browser.close()


if __name__ == "__main__":
    asyncio.run(main())
