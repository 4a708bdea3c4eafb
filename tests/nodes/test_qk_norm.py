"""Under ComfyUI the norms of queries and keys run in the kernel only while core leaves their weights as they are."""

from dataclasses import replace

import pytest
import torch

from sana_core.checkpoint import load_transformer
from sana_core.kernels import REFERENCE
from tests import tiny

WEIGHT = "diffusion_model.blocks.1.attn.k_norm.weight"


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "diffusion_models" / "sprint.safetensors"


@pytest.fixture
def patcher(part, path):
    return part("nodes.adapter").load_model(path, dtype=torch.float32)


@pytest.fixture
def handed(patcher):
    """Block and norms of each self-attention, as the kernels get them."""
    seen, hooks = [], patcher.model.diffusion_model.hooks

    def linear_attention(q, k, v, eps, norms=None):
        seen.append(norms)
        return REFERENCE.linear_attention(q, k, v, eps, norms)

    hooks.kernels = replace(hooks.kernels, linear_attention=linear_attention)
    return seen


@pytest.fixture
def inputs():
    return tiny.inputs([0.9, 0.3], tokens=6)


def predict(patcher, inputs, options=None):
    return patcher.model.diffusion_model(*inputs.values(), guidance=4.5, transformer_options=options)


def plain(path, inputs, change=lambda network: None):
    network = load_transformer(path)
    change(network)
    return network(*inputs.values(), guidance=torch.full((2,), 4.5))


def close(actual, expected):
    return (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_norms_at_rest_run_in_the_kernel(patcher, handed, path, inputs):
    assert close(predict(patcher, inputs), plain(path, inputs))
    blocks = patcher.model.diffusion_model.blocks
    assert [norms.k_weight for norms in handed] == [block.attn.k_norm.weight for block in blocks]


def cast(patcher):
    """What core does to layers whose weights it moves or casts at each use."""
    patcher.model.diffusion_model.blocks[1].attn.k_norm.comfy_cast_weights = True


def patched_at_use(patcher):
    patcher.model.diffusion_model.blocks[1].attn.k_norm.weight_function = [lambda weight: weight]


def hooked(patcher):
    patcher.model.diffusion_model.blocks[1].attn.k_norm.register_forward_hook(lambda *_: None)


def kept_in_16_bits(patcher):
    patcher.model.diffusion_model.blocks[1].attn.k_norm.bfloat16().comfy_cast_weights = True


@pytest.mark.parametrize("change", [cast, patched_at_use, hooked, kept_in_16_bits], ids=lambda one: one.__name__)
def test_norms_that_core_has_a_hand_in_are_called(patcher, handed, path, inputs, change):
    change(patcher)
    out = predict(patcher, inputs)
    assert [norms is None for norms in handed] == [False, True]

    def rounded(network):
        if change is kept_in_16_bits:
            network.blocks[1].attn.k_norm.bfloat16().float()

    assert close(out, plain(path, inputs, rounded))


@pytest.mark.parametrize("memory", [0, 1], ids=["whole", "low memory"])
def test_a_patch_of_a_norm_counts(patcher, handed, path, inputs, memory):
    """Core adds it to the weight when it loads the model, or, short of memory, at each use."""
    difference = torch.linspace(-1, 1, tiny.TRANSFORMER.hidden_size)
    patcher.add_patches({WEIGHT: ("diff", (difference,))})
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=memory)

    def patch(network):
        network.blocks[1].attn.k_norm.weight.data += difference

    expected = plain(path, inputs, patch)
    assert close(predict(patcher, inputs), expected) and not close(expected, plain(path, inputs))
    assert [norms is None for norms in handed] == ([True, True] if memory else [False, False])


def test_attention_patches_get_normed_queries_and_keys(patcher, inputs):
    attention, seen = patcher.model.diffusion_model.blocks[1].attn, []
    projected = []
    attention.qkv.register_forward_hook(lambda module, args, out: projected.append(out))

    def patch(q, k, v, options):
        seen.extend([q, k, v])
        return v

    predict(patcher, inputs, {"patches_replace": {"attn1": {("block", 1): patch}}})
    q, k, v = projected[0].chunk(3, dim=-1)
    assert torch.equal(seen[0], attention.q_norm(q)) and torch.equal(seen[1], attention.k_norm(k))
    assert torch.equal(seen[2], v)
