"""What a user does with an old graph in the real front end: drop it, press Replace All, choose what is left, run it."""

import pytest

from tests import old_graphs
from tests.browser.test_front_end import drop

pytestmark = pytest.mark.browser

RED = "app.graph.nodes.filter((n) => n.has_errors || !LiteGraph.registered_node_types[n.type]).map((n) => n.type)"
LINKS = """
app.graph.nodes.flatMap((node) => node.inputs.map((input, slot) => [app.graph.links.get(input.link), node.id, slot]))
  .filter(([link]) => link).map(([link, id, slot]) => [link.id, link.origin_id, link.origin_slot, id, slot].map(Number))
"""
TEXTS = """
app.graph.nodes.filter((n) => n.type === "SanaPromptEncode")
  .map((n) => [n.id, ...["text", "use_instruction"].map((name) => n.widgets.find((w) => w.name === name).value)])
"""
PICK = """
([inputs, files]) => {
  for (const node of app.graph.nodes) {
    const widget = node.widgets?.find((widget) => widget.name === inputs[node.type]);
    if (widget) widget.value = files[node.type];
  }
}
"""
USE_SPRINT_SAMPLER = """
() => {
  const old = app.graph.nodes.find((node) => node.type === "KSampler");
  const sampler = LiteGraph.createNode("SanaSprintSampler");
  app.graph.add(sampler);
  for (const name of ["model", "positive", "latent_image"]) {
    const link = app.graph.links.get(old.inputs.find((input) => input.name === name).link);
    app.graph.getNodeById(link.origin_id).connect(link.origin_slot, sampler, name);
  }
  const { target_id, target_slot } = app.graph.links.get(old.outputs[0].links[0]);
  sampler.connect(0, app.graph.getNodeById(target_id), target_slot);
  app.graph.remove(old);
}
"""
LISTEN = """
() => {
  app.api.addEventListener("execution_success", () => (window.ended = "success"));
  for (const kind of ["execution_error", "promptQueueingFailed"])
    app.api.addEventListener(kind, (event) => (window.ended = JSON.stringify(event.detail) ?? kind));
}
"""
SIZES = {"conditioned": (96, 64), "sana": (384, 672), "sprint": (96, 64), "sprint_first": (64, 64)}


def old_nodes(graph):
    return [node for node in graph["nodes"] if node["type"] in old_graphs.OLD_CLASSES]


def links_to_keep(graph):
    """All but those into the size of SanaResolutionCond, which nothing reads."""
    dropped = [
        entry["link"]
        for node in graph["nodes"]
        if node["type"] == "SanaResolutionCond"
        for entry in node["inputs"]
        if "widget" in entry
    ]
    return sorted(link[:5] for link in graph["links"] if link[0] not in dropped)


def texts_of(graph):
    kinds = {"SanaTextEncode": True, "GemmaTextEncode": False}
    return sorted(
        [node["id"], node["widgets_values"][0], kinds[node["type"]]] for node in graph["nodes"] if node["type"] in kinds
    )


def replace_all(page):
    """Presses Replace All in the list of errors, which a banner leads to."""
    button = page.get_by_role("button", name="Replace All")
    if not button.is_visible():
        page.get_by_test_id("error-overlay-see-errors").dispatch_event("click")
    button.dispatch_event("click")


def open_and_replace(page, name):
    """Drops the graph; all its old nodes are red, and none is when they were replaced."""
    graph = old_graphs.ui(name)
    drop(page, f"{name}.json", (old_graphs.FOLDER / f"{name}.json").read_bytes(), "application/json")
    page.wait_for_function(f"count => {RED}.length === count", arg=len(old_nodes(graph)))
    assert sorted(page.evaluate(RED)) == sorted(node["type"] for node in old_nodes(graph))
    replace_all(page)
    page.wait_for_function(f"{RED}.length === 0")
    return graph


def test_old_graphs_open_and_run(page, address):
    page.evaluate(LISTEN)
    for name in old_graphs.NAMES:
        graph = open_and_replace(page, name)
        assert len(page.evaluate("app.graph.nodes")) == len(graph["nodes"])
        assert sorted(page.evaluate(LINKS)) == links_to_keep(graph), name
        assert sorted([int(node), *rest] for node, *rest in page.evaluate(TEXTS)) == texts_of(graph), name

        page.evaluate(PICK, [old_graphs.FILE_INPUTS, old_graphs.files(name)])
        if name in old_graphs.SPRINT:
            page.evaluate(USE_SPRINT_SAMPLER)
        page.evaluate("window.ended = null")
        page.get_by_test_id("queue-button").click()
        page.wait_for_function("window.ended", timeout=120_000)
        assert page.evaluate("window.ended") == "success", name
        picture = "app.graph.nodes.find((node) => node.type === 'SaveImage').imgs?.[0]"
        page.wait_for_function(f"{picture}?.naturalWidth > 0")
        assert tuple(page.evaluate(f"[{picture}.naturalWidth, {picture}.naturalHeight]")) == SIZES[name], name
