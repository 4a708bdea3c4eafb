"""What a newcomer does in ComfyUI's front end: drop a workflow on the canvas, press Run, look at the picture."""

import base64
import json

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.browser

WORKFLOWS = ROOT / "workflows"
DEFAULT = "sana_nano_text_to_image"

DROP = """
({ name, type, content }) => {
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  const canvas = document.querySelector("#graph-canvas");
  const { x, bottom } = canvas.getBoundingClientRect();  // the bottom left corner is free of nodes
  const at = { bubbles: true, cancelable: true, dataTransfer, clientX: x + 300, clientY: bottom - 20 };
  for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, at));
}
"""
PICTURE = "app.graph.nodes.find((node) => node.type === 'SaveImage').imgs?.[0]"


def drop(page, name, content, kind):
    """Drops a file on the canvas."""
    page.evaluate(DROP, {"name": name, "type": kind, "content": base64.b64encode(content).decode()})


def drop_workflow(page, name):
    """Drops a shipped workflow on the canvas and waits for its nodes; returns what the file holds."""
    content = (WORKFLOWS / f"{name}.json").read_bytes()
    graph = json.loads(content)
    drop(page, f"{name}.json", content, "application/json")
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(graph["nodes"]))
    return graph


def nodes_on(page):
    """What makes up the graph on the canvas: ids, types, places, sizes and widgets."""
    return json.loads(
        page.evaluate(
            "JSON.stringify(app.graph.serialize().nodes.map((node) => "
            "[node.id, node.type, node.title, node.pos, node.size, node.widgets_values]))"
        )
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_a_dropped_workflow_is_the_api_workflow(page, name):
    drop_workflow(page, name)
    prompt = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    assert prompt == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_drop_run_and_drop_the_picture_back(page, address, tmp_path):
    drop_workflow(page, DEFAULT)
    before = nodes_on(page)
    page.evaluate("app.api.addEventListener('executed', (event) => (window.executed = event.detail))")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"{PICTURE}?.naturalWidth > 0", timeout=120_000)
    assert page.evaluate(f"[{PICTURE}.naturalWidth, {PICTURE}.naturalHeight]") == [256, 256]
    page.screenshot(path=tmp_path / "after_run.png")

    saved = page.evaluate("window.executed.output.images[0]")
    response = page.request.get(f"{address}/view", params=saved)
    assert response.ok
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("app.graph.nodes.length === 0")
    drop(page, saved["filename"], response.body(), "image/png")
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(before))
    assert nodes_on(page) == before


PICK_BEST = """
() => {
  const add = (type, values) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    for (const [name, value] of Object.entries(values))
      node.widgets.find((widget) => widget.name === name).value = value;
    return node;
  };
  const images = add("EmptyImage", { width: 256, height: 256, batch_size: 2 });
  const scorer = add("SanaScorerLoader", { scorer_name: "sana-nano" });
  const best = add("SanaPickBest", { prompt: "a panda" });
  images.connect(0, best, "images");
  scorer.connect(0, best, "scorer");
  best.connect(0, add("PreviewImage", {}), "images");
}
"""


def test_what_a_node_says_is_written_on_it(page):
    page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("app.graph.nodes.length === 0")
    page.evaluate(PICK_BEST)
    page.get_by_test_id("queue-button").click()
    said = "app.graph.nodes.find((node) => node.type === 'SanaPickBest').widgets.map((widget) => String(widget.value))"
    page.wait_for_function(f"{said}.includes('0: 0.0000\\n1: 0.0000')", timeout=60_000)


def test_the_templates_are_listed_with_thumbnails(page, address):
    templates = page.request.get(f"{address}/api/workflow_templates").json()
    (pack,) = [pack for pack, names in templates.items() if DEFAULT in names]
    assert sorted(templates[pack]) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    for name in templates[pack]:
        thumbnail = page.request.get(f"{address}/api/workflow_templates/{pack}/{name}.jpg")
        assert thumbnail.body() == (WORKFLOWS / f"{name}.jpg").read_bytes()


def test_missing_files_are_offered_for_download(page):
    graph = drop_workflow(page, "sana_text_to_image_1024")
    wanted = [model["name"] for node in graph["nodes"] for model in node["properties"].get("models", [])]
    assert len(wanted) == 3
    # A plain click would wait for an overlay that fades by animation frames, of which there are few without a GPU.
    page.get_by_test_id("error-overlay-see-errors").dispatch_event("click")
    buttons = page.get_by_test_id("missing-model-download")
    buttons.first.wait_for()
    labels = [button.get_attribute("aria-label") for button in buttons.all()]
    assert sorted(labels) == sorted(f"Download {name}" for name in wanted)
