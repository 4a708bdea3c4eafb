"""Makes the UI workflows and their thumbnails from workflows/api/*.json, with ComfyUI's own front end in Chromium.

    bash scripts/environment.sh --test
    COMFYUI_PATH=$(bash scripts/comfyui.sh) .venv/bin/python scripts/workflows.py

The API files are the source of what runs; the tables below add what only a reader needs: groups, notes, the files
that the front end offers to download. Sizes and widgets are the front end's, since only it knows them.
"""

import asyncio
import json
import os
import uuid
from pathlib import Path

import aiohttp
from demo import OUTPUT, Server, Status, free_port, queue_workflow, wait_for_images
from PIL import Image
from playwright.async_api import async_playwright

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
CHROMIUM = "/usr/bin/chromium"
THUMBNAIL = 512  # pixels a side
HUGGING_FACE = "https://huggingface.co"

GROUPS = [  # title, colour, nodes by their title in the API file; one column each, from the left
    ("1. Models", "#3f789e", ["Transformer", "Text encoder", "Autoencoder"]),
    ("2. What to draw", "#8a8", ["Prompt", "Negative prompt", "Size"]),
    ("3. Draw it", "#b06634", ["Sampler"]),
    ("4. The picture", "#88a", ["Decode", "Picture"]),
]

NOTES = {  # Markdown, shown left of the groups
    "sana_nano_text_to_image": (
        "sana-nano",
        """# Text to image with sana-nano

Press **Run**. The models come with the pack, so there is nothing to download, and a CPU is enough.

sana-nano is a real but tiny Sana: 256 x 256 pixels, emoji on plain backgrounds. It knows sentences such as

- a 🐼 on the left of a red background
- 红色背景左边的熊猫

The negative prompt stays empty: that is how the model was trained.

For pictures of anything, open the template *sana_text_to_image_1024*.
""",
    ),
    "sana_text_to_image_1024": (
        "Files to download",
        """# Text to image with Sana 1.6B, 1024 px

ComfyUI marks the loaders whose file is missing and offers the download. By hand:

| File | Folder |
| --- | --- |
| [Sana_1600M_1024px_BF16.pth]({transformer}) (6.4 GB) | `models/diffusion_models` |
| [gemma_2_2b_it_elm_bf16.safetensors]({text_encoder}) (5.2 GB) | `models/text_encoders` |
| [model.safetensors]({autoencoder}) (1.2 GB), **renamed** to `dc-ae-f32c32-sana-1.1.safetensors` | `models/vae` |

**Terms.** Gemma is under Google's Gemma Terms of Use. For the Sana weights the model cards name an NVIDIA licence,
while licence files in some of the repositories say Apache-2.0: read the page of the file that you use.

**Settings.** 20 steps and guidance 4.5 are the authors' defaults. Other sizes: the node *Sana Resolution* has the
official table. Prompts may be English, Chinese or emoji; beyond 300 tokens they are cut.
""",
    ),
}

MODELS = {  # workflow -> node title -> the file that the node wants
    "sana_text_to_image_1024": {
        "Transformer": {
            "name": "Sana_1600M_1024px_BF16.pth",
            "url": f"{HUGGING_FACE}/Efficient-Large-Model/Sana_1600M_1024px_BF16/resolve/main/checkpoints/"
            "Sana_1600M_1024px_BF16.pth",
            "directory": "diffusion_models",
        },
        "Text encoder": {
            "name": "gemma_2_2b_it_elm_bf16.safetensors",
            "url": f"{HUGGING_FACE}/Comfy-Org/PixelDiT/resolve/main/text_encoders/gemma_2_2b_it_elm_bf16.safetensors",
            "directory": "text_encoders",
        },
        "Autoencoder": {
            "name": "dc-ae-f32c32-sana-1.1.safetensors",
            "url": f"{HUGGING_FACE}/mit-han-lab/dc-ae-f32c32-sana-1.1/resolve/main/model.safetensors",
            "directory": "vae",
        },
    },
}

# Places the nodes of an API workflow in columns, one group each, and returns the graph as the front end saves it.
LAY_OUT = """
async ({ name, api, groups, note, models, id }) => {
  const GAP = 30, TITLE = LiteGraph.NODE_TITLE_HEIGHT, HEADER = 50, WIDTH = 330;
  const LEAST_HEIGHT = { SanaPromptEncode: 260, SanaSampler: 520, SaveImage: 400 }; // with room for previews
  await app.loadApiJson(api, name);
  const graph = app.graph;
  const byTitle = new Map(graph.nodes.map((node) => [api[node.id]._meta.title, node]));
  let x = 0;
  for (const [title, color, members] of groups) {
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
    }
    const group = new LiteGraph.LGraphGroup(title);
    group.color = color;
    group.pos = [x, 0];
    group.size = [WIDTH + 2 * GAP, y - TITLE];
    graph.add(group);
    x += WIDTH + 3 * GAP;
  }
  const [noteTitle, noteText] = note;
  const reader = LiteGraph.createNode("MarkdownNote");
  graph.add(reader);
  reader.title = noteTitle;
  reader.widgets[0].value = noteText;
  reader.pos = [-420 - GAP, TITLE];
  reader.setSize([420, 400]);
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


def note_of(name):
    """Title and text of a workflow's note."""
    title, text = NOTES[name]
    urls = {node.lower().replace(" ", "_"): model["url"] for node, model in MODELS.get(name, {}).items()}
    return title, text.format(**urls)


async def open_front_end(playwright, server):
    """Opens ComfyUI's page in Chromium and returns it."""
    browser = await playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    )
    page = await browser.new_page(viewport={"width": 1800, "height": 1000})
    await page.goto(server.address)
    await page.wait_for_function("window.app?.isGraphReady", timeout=60_000)
    return page


async def author(page, name, api):
    """Writes the UI workflow of an API workflow; returns the screenshot of its graph."""
    arguments = {
        "name": name,
        "api": api,
        "groups": GROUPS,
        "note": note_of(name),
        "models": MODELS.get(name, {}),
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
    with Server(Path(os.environ["COMFYUI_PATH"]), free_port(8188)) as server:
        async with aiohttp.ClientSession() as session, async_playwright() as playwright:
            await server.wait_until_up(session, Status())
            # A first visitor's tutorial would cover the graph.
            await session.post(f"{server.address}/api/settings/Comfy.TutorialCompleted", json=True)
            page = await open_front_end(playwright, server)
            for path in sorted((WORKFLOWS / "api").glob("*.json")):
                api = json.loads(path.read_text(encoding="utf-8"))
                picture = await author(page, path.stem, api)
                if path.stem not in MODELS:  # nothing to download: the thumbnail shows what the workflow draws
                    picture = await draw(session, server, api)
                save_thumbnail(picture, path.parents[1] / f"{path.stem}.jpg")
            await page.context.browser.close()


if __name__ == "__main__":
    asyncio.run(main())
