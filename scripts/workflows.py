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
from playwright.sync_api import sync_playwright

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
CHROMIUM = "/usr/bin/chromium"
THUMBNAIL = 512  # pixels a side
HUGGING_FACE = "https://huggingface.co"

GROUPS = [  # title, colour, nodes by their title in the API file; one column each, from the left
    ("1. Models", "#3f789e", ["Transformer", "Text encoder", "Autoencoder"]),
    ("2. What to draw", "#8a8", ["Prompt", "Negative prompt", "Size"]),
    ("3. Draw it", "#b06634", ["Sampler", "Decode"]),
    ("4. The picture", "#88a", ["Picture"]),
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
  const GAP = 30, TITLE = LiteGraph.NODE_TITLE_HEIGHT, HEADER = 50, WIDTH = 340, LOW = 100;
  await app.loadApiJson(api, name);
  const graph = app.graph;
  const byTitle = new Map(graph.nodes.map((node) => [api[node.id]._meta.title, node]));
  let x = 0;
  for (const [title, color, members] of groups) {
    let y = HEADER + TITLE;
    for (const member of members) {
      const node = byTitle.get(member);
      node.title = member;
      const [, height] = node.computeSize();
      const tall = node.widgets?.some((widget) => widget.type === "customtext") || node.type === "SaveImage";
      node.pos = [x + GAP, y];
      node.setSize([WIDTH, Math.max(height, node.type === "SaveImage" ? 420 : tall ? 200 : LOW)]);
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
  reader.pos = [-480 - GAP, TITLE];
  reader.setSize([480, 520]);
  const saved = graph.serialize();
  return { ...saved, id, revision: 0, extra: {} };
}
"""


async def draw(server, api):
    """Runs an API workflow; returns the path of its picture."""
    async with aiohttp.ClientSession() as session:
        client_id = uuid.uuid4().hex
        async with session.ws_connect(f"{server.address}/ws?clientId={client_id}", max_msg_size=0) as socket:
            prompt_id = await queue_workflow(session, server, api, client_id)
            return (await wait_for_images(socket, prompt_id, api, Status()))[0]


async def prepare(server):
    """Waits for the server and dismisses the tutorial, which would cover the graph."""
    async with aiohttp.ClientSession() as session:
        await server.wait_until_up(session, Status())
        async with session.post(f"{server.address}/api/settings/Comfy.TutorialCompleted", json=True) as response:
            response.raise_for_status()


def save_thumbnail(source, target):
    """Saves the middle square of a picture as a small JPEG."""
    with Image.open(source) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(target, quality=88)


def author(page, path):
    """Writes the UI workflow of one API file; returns the screenshot of its graph."""
    name, api = path.stem, json.loads(path.read_text(encoding="utf-8"))
    models = MODELS.get(name, {})
    title, text = NOTES[name]
    if models:
        text = text.format(
            transformer=models["Transformer"]["url"],
            text_encoder=models["Text encoder"]["url"],
            autoencoder=models["Autoencoder"]["url"],
        )
    graph = page.evaluate(
        LAY_OUT,
        {
            "name": name,
            "api": api,
            "groups": GROUPS,
            "note": [title, text],
            "models": models,
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        },
    )
    target = WORKFLOWS / f"{name}.json"
    target.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page.evaluate("async (graph) => { await app.loadGraphData(graph, true, true, 'check') }", graph)
    page.evaluate("async () => { await app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    page.wait_for_timeout(1500)
    screenshot = OUTPUT / f"{name}_graph.png"
    page.screenshot(path=screenshot)
    print(f"{target} (its graph: {screenshot})")
    return screenshot


def main():
    sources = sorted((WORKFLOWS / "api").glob("*.json"))
    with Server(Path(os.environ["COMFYUI_PATH"]), free_port(8188)) as server, sync_playwright() as playwright:
        asyncio.run(prepare(server))
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.goto(server.address)
        page.wait_for_function("window.app?.isGraphReady", timeout=60_000)
        for path in sources:
            picture = author(page, path)
            if path.stem not in MODELS:  # nothing to download: the thumbnail shows what the workflow draws
                picture = asyncio.run(draw(server, json.loads(path.read_text(encoding="utf-8"))))
            save_thumbnail(picture, WORKFLOWS / f"{path.stem}.jpg")
        browser.close()


if __name__ == "__main__":
    main()
