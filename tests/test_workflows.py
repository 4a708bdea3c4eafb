"""The shipped workflows: what the front end shows is what the API files run, and a reader finds their way in them."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "workflows"
CORE_NODES = {
    "ControlNetApplyAdvanced", "ImageCompositeMasked", "LoadImage", "LossGraphNode", "ResizeImageMaskNode",
    "SaveImage", "SetLatentNoiseMask",
}  # fmt: skip
BUTTON = "IMAGEUPLOAD"  # a widget of LoadImage that does not run
FRONT_END_NODES = {"MarkdownNote"}  # exist in the browser only
LOADERS = {
    "SanaDiffusionModelLoader": "diffusion_models",
    "SanaTextEncoderLoader": "text_encoders",
    "SanaDCAELoader": "vae",
}
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize"}
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def graph(name):
    return read(WORKFLOWS / f"{name}.json")


@pytest.fixture
def api(name):
    return read(WORKFLOWS / "api" / f"{name}.json")


def runnable(graph):
    return [node for node in graph["nodes"] if node["type"] not in FRONT_END_NODES]


def widgets_of(node):
    """Names and values of a node's widgets, and what its seed does after a run (None without a seed)."""
    names = [entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry]
    values = list(node.get("widgets_values", []))
    control = None
    if "seed" in names:
        control = values.pop(names.index("seed") + 1)
    assert len(names) == len(values), node["type"]
    buttons = {entry["name"] for entry in node["inputs"] if entry["type"] == BUTTON}
    widgets = zip(names, values, strict=True)
    return {name: value for name, value in widgets if name not in buttons}, control


def api_of(graph):
    """The API workflow that a UI workflow stands for."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in graph["links"]}
    workflow = {}
    for node in runnable(graph):
        links = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry.get("link") is not None}
        workflow[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {**widgets_of(node)[0], **links},
            "_meta": {"title": node["title"]},
        }
    return workflow


def own_node_ids():
    """The ids in the schemas of nodes/, read from the source."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "nodes").glob("*.py")]
    keywords = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    return {node.value.value for node in keywords if node.arg == "node_id" and isinstance(node.value, ast.Constant)}


def test_every_workflow_has_both_formats():
    assert {"sana_nano_text_to_image", "sana_text_to_image_1024"} <= set(NAMES)
    assert NAMES == sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def test_both_formats_say_the_same(graph, api):
    assert api_of(graph) == api


def test_every_node_exists(graph):
    assert {node["type"] for node in runnable(graph)} <= own_node_ids() | CORE_NODES


def test_seeds_are_fixed(graph):
    controls = {widgets_of(node)[1] for node in runnable(graph)}
    assert "fixed" in controls and SEED_CONTROLS.isdisjoint(controls - {"fixed"})


def test_a_reader_finds_notes_and_groups(graph):
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(len(note["widgets_values"][0]) > 200 for note in notes)
    for node in runnable(graph):
        x, y = node["pos"]
        width, height = node["size"]
        boxes = [group["bounding"] for group in graph["groups"]]
        around = [
            (left, top)
            for left, top, group_width, group_height in boxes
            if left <= x and top <= y and x + width <= left + group_width and y + height <= top + group_height
        ]
        assert len(around) == 1, f"{node['title']} must lie in one group"


def test_nodes_do_not_overlap(graph):
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for index, (left, top, width, height) in enumerate(boxes):
        for other_left, other_top, other_width, other_height in boxes[:index]:
            apart_across = left >= other_left + other_width or other_left >= left + width
            apart_down = top >= other_top + other_height or other_top >= top + height
            assert apart_across or apart_down


def test_loaders_say_where_their_file_is(name, graph):
    for node in runnable(graph):
        if node["type"] not in LOADERS:
            continue
        wanted = next(iter(widgets_of(node)[0].values()))
        if (ROOT / "models" / LOADERS[node["type"]] / wanted).is_file():
            continue  # ships with the pack
        (model,) = node["properties"]["models"]
        assert model["name"] == wanted
        assert model["directory"] == LOADERS[node["type"]]
        # The front end offers a download from these places and of these types only.
        assert model["url"].startswith("https://huggingface.co/")
        assert Path(model["url"]).suffix in {".safetensors", ".pth"}
        assert model["url"] in json.dumps([node.get("widgets_values") for node in graph["nodes"]])


def test_the_default_workflow_needs_no_download():
    graph = read(WORKFLOWS / "sana_nano_text_to_image.json")
    loaders = [node for node in graph["nodes"] if node["type"] in LOADERS]
    assert len(loaders) == 3
    for node in loaders:
        assert (ROOT / "models" / LOADERS[node["type"]] / next(iter(widgets_of(node)[0].values()))).is_file()


def test_the_thumbnail_is_a_small_jpeg(name):
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.size == (512, 512)
