"""Under ComfyUI a processor computes with packed weights only where nothing else has a say in them."""

import pytest
import torch

STEPS = 6  # more than are computed before weights are packed
LAYERS = ["attn.qkv", "attn.proj", "mlp.inverted_conv.conv", "mlp.point_conv.conv"]
pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="weights are packed by MKL")


@pytest.fixture
def load(part, tiny_models, monkeypatch):
    monkeypatch.setattr(part("sana_core.models.packing"), "LEAST_WEIGHTS", 0)
    return lambda **options: part("nodes.adapter").load_model(
        tiny_models / "diffusion_models" / "tiny.safetensors", **options
    )


@pytest.fixture
def plain(part, sample):
    """The same run without packed weights."""

    def run(patcher, *args):
        patcher.model.packed._is_large = False
        result = sample(patcher, *args)
        patcher.model.packed._is_large = True
        return result

    return run


def agree(found, expected):
    """But for rounding."""
    return (found - expected).abs().max() < 1e-5 * expected.abs().max()


def lora(patcher, layer):
    clone = patcher.clone()
    weight = patcher.model.diffusion_model.get_parameter(f"blocks.0.{layer}.weight")
    clone.add_patches({f"diffusion_model.blocks.0.{layer}.weight": (torch.ones_like(weight),)}, 0.1)
    return clone


@pytest.mark.parametrize("cuda_graph", [None, False])
def test_the_picture_is_the_same(load, sample, plain, cuda_graph):
    patcher = load(cuda_graph=cuda_graph)
    expected = plain(patcher)
    assert agree(sample(patcher), expected) and patcher.model.packed.weights is not None
    first = patcher.model.packed.weights
    assert agree(sample(patcher), expected) and patcher.model.packed.weights is first, "kept from run to run"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_lora_never_meets_other_packed_weights(load, sample, plain, layer):
    patcher = load()
    changed = lora(patcher, layer)
    before, after = plain(patcher), plain(changed)
    assert not agree(after, before)
    for model, expected in [(patcher, before), (changed, after), (patcher, before)]:
        assert agree(sample(model), expected) and patcher.model.packed.weights is not None


@pytest.mark.parametrize("reason", ["cast", "patches_replace"])
def test_other_ways_to_compute_do_without(load, sample, plain, reason):
    patcher = load()
    if reason == "cast":
        patcher.model.diffusion_model.x_embedder.proj.comfy_cast_weights = True
    else:
        patcher.set_model_attn1_replace(lambda q, k, v, options: v, "block", 0)
    assert torch.equal(sample(patcher), plain(patcher)) and patcher.model.packed.weights is None


def test_unloading_frees_packed_weights(load, sample):
    patcher = load()
    sample(patcher)
    patcher.detach(unpatch_all=False)
    assert patcher.model.packed.weights is not None, "another clone takes its place"
    patcher.detach()
    assert patcher.model.packed.weights is None
