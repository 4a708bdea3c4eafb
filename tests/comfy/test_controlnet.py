"""ControlNet on a real server, by the pack's nodes and by ComfyUI's."""

import pytest
import torch
from PIL import Image, ImageDraw

from tests.comfy.graphs import empty, encode, k_sample, latent_of, sample, save_latent

pytestmark = pytest.mark.server


@pytest.fixture
def lines(server):
    """A picture of white lines among the server's inputs, of another size than the latents."""
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    picture = Image.new("L", (150, 130))
    draw = ImageDraw.Draw(picture)
    draw.line((10, 10, 120, 110), fill=255, width=5)
    draw.ellipse((40, 30, 100, 90), outline=255, width=3)
    picture.save(folder / "lines.png")


@pytest.fixture
def parts(graph, models, lines):
    """What the nodes that apply a ControlNet are connected to."""
    return {
        "control_net": graph.add("SanaControlNetLoader", control_net_name="tiny.safetensors"),
        "image": graph.add("LoadImage", image="lines.png"),
        "vae": models[2],
    }


@pytest.fixture
def captions(graph, models):
    return encode(graph, models[1]), encode(graph, models[1], "")


def apply(graph, captions, parts, node="ControlNetApplyAdvanced", **changes):
    inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0} | parts | changes
    positive = graph.add(node, positive=captions[0], negative=captions[1], **inputs)
    return positive, [positive[0], 1]


@pytest.fixture
def drawn(server, graph, models):
    """The latent that the stock KSampler gives for two conditionings."""

    def draw(captions, **latent):
        save_latent(graph, k_sample(graph, models[0], *captions, empty(graph, **latent), steps=3))
        result = latent_of(server, graph)
        for node in ("SaveLatent", "KSampler"):
            graph.remove(node)
        return result

    return draw


def differs(one, other):
    return (one - other).abs().max() > 1e-2 * other.abs().max()


def test_stock_and_own_apply_draw_the_same(graph, captions, parts, drawn):
    plain = drawn(captions)
    controlled = drawn(apply(graph, captions, parts))
    assert controlled.isfinite().all() and differs(controlled, plain)
    assert torch.equal(drawn(apply(graph, captions, parts, "SanaControlNetApply")), controlled)


def test_what_comes_to_no_control(graph, captions, parts, drawn):
    """Strength 0, and a part of the schedule in which no step is taken."""
    plain = drawn(captions)
    for changes in ({"strength": 0.0}, {"start_percent": 0.999}, {"end_percent": 0.001, "start_percent": 0.001}):
        assert torch.equal(drawn(apply(graph, captions, parts, **changes)), plain), changes


def test_part_of_the_schedule_and_strength_count(graph, captions, parts, drawn):
    whole = drawn(apply(graph, captions, parts))
    for changes in ({"strength": 0.4}, {"end_percent": 0.3}, {"start_percent": 0.3}):
        assert differs(drawn(apply(graph, captions, parts, **changes)), whole), changes


def test_chaining_and_one_side(graph, captions, parts, drawn):
    once = apply(graph, captions, parts, strength=0.5)
    alone = drawn(once)
    assert differs(drawn(apply(graph, once, parts, strength=0.5)), alone)
    assert differs(drawn((once[0], captions[1])), alone)


def test_a_batch_of_latents(graph, captions, parts, drawn):
    latents = drawn(apply(graph, captions, parts), batch_size=2, width=64, height=96)
    assert latents.shape == (2, 32, 3, 2) and latents.isfinite().all()


def test_own_samplers_take_it(server, graph, models, captions, parts):
    positive, negative = apply(graph, captions, parts)
    patched = graph.add("SanaPAG", model=models[0], scale=2.0)
    sampled = sample(graph, (patched, *models[1:]))
    save_latent(graph, sampled)
    plain = latent_of(server, graph)
    graph.nodes[sampled[0]]["inputs"] |= {"positive": positive, "negative": negative}
    assert differs(latent_of(server, graph), plain)


def test_sprint_takes_it(server, graph, models, captions, parts):
    """Of the same width: the branch is that of a base model, the embeddings are Sprint's."""
    model = graph.add("SanaDiffusionModelLoader", model_name="sprint.safetensors", variant="auto", dtype="auto")
    sampled = graph.add(
        "SanaSprintSampler", model=model, positive=captions[0], latent_image=empty(graph), seed=7, steps=2,
        guidance=4.5, denoise=1.0,
    )  # fmt: skip
    save_latent(graph, sampled)
    plain = latent_of(server, graph)
    graph.nodes[sampled[0]]["inputs"]["positive"] = apply(graph, captions, parts)[0]
    assert differs(latent_of(server, graph), plain)


def test_without_a_vae_the_error_says_so(server, graph, models, captions, parts):
    del parts["vae"]
    controlled = apply(graph, captions, parts)
    save_latent(graph, k_sample(graph, models[0], *controlled, empty(graph)))
    run = server.run(graph)
    assert run.error["node_type"] == "ControlNetApplyAdvanced"
    assert "no VAE is connected. Connect Load Sana DC-AE to the vae input" in run.error["exception_message"]
