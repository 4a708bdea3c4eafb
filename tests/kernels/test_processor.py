"""The processor's kernels are as near to float64 as the reference, and leave to it what they do not know."""

from dataclasses import replace

import pytest
import torch

from sana_core.kernels import REFERENCE, QKNorm, processor, reference
from sana_core.kernels.processor import PROCESSOR, gated_residual_
from sana_core.models.sana import SanaTransformer
from tests import tiny
from tests.kernels.fused import EXACT, distance

SHAPES = [(1, 63, 3, 8), (2, 500, 2, 32), (1, 1000, 4, 32)]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(batch, tokens, count, width, dtype=torch.float32):
    """q, k and v as a transformer has them: parts of one tensor."""
    parts = draw(batch, tokens, 3 * count * width, dtype=dtype).chunk(3, dim=-1)
    return [part.unflatten(-1, (count, width)) for part in parts]


def qk_norm(channels):
    return QKNorm(1 + draw(channels, seed=1), 1 + draw(channels, seed=2), 1e-5)


def nearly(found, expected, truth):
    """Whether a result is about as near to float64 as another one."""
    return distance(found, truth) <= max(1.2 * distance(expected, truth), 1e-7)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_linear_attention(shape, normed, poisoned):
    given = heads(*shape)
    norms = qk_norm(shape[2] * shape[3]) if normed else None
    truth = EXACT["linear_attention"](*(part.double() for part in given), 1e-8, norms)
    expected = reference.linear_attention(*given, 1e-8, norms)
    found = processor.linear_attention(*given, 1e-8, norms)
    assert found.shape == expected.shape and found.is_contiguous()
    assert nearly(found, expected, truth)


def test_linear_attention_without_positive_keys_is_zero_and_nan_stays_nan():
    q, k, v = heads(1, 5, 1, 4)
    assert torch.equal(processor.linear_attention(q, -torch.ones_like(q), v, 1e-8), torch.zeros_like(v))
    q, k, v = heads(1, 5, 1, 4)
    k[0, 2] = torch.nan
    assert processor.linear_attention(q, k, v, 1e-8).isnan().all()


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_modulate(rows):
    given = draw(rows, 63, 40), draw(rows, 1, 40, seed=1), draw(rows, 1, 40, seed=2)
    expected, found = reference.modulate(*given), processor.modulate(*given)
    assert torch.equal(found, expected) if rows > 1 else nearly(found, expected, reference.modulate(*map(wide, given)))


def wide(tensor):
    return tensor.double()


def test_gated_residual_in_place():
    x, gate, branch = draw(2, 7, 16), draw(2, 1, 16, seed=1), draw(2, 7, 16, seed=2)
    expected = reference.gated_residual(x, gate, branch)
    assert gated_residual_(x, gate, branch) is branch and torch.equal(branch, expected)


def test_a_shift_for_every_token_is_left_to_the_reference():
    x = draw(1, 7, 16)
    assert torch.equal(processor.modulate(x, x, x), reference.modulate(x, x, x))


@pytest.mark.parametrize("name", ["linear_attention", "modulate"])
@pytest.mark.parametrize("way", ["gradients", "bfloat16", "float16", "float64", "autocast"])
def test_other_ways_to_compute_are_the_references(name, way):
    def inputs():
        dtype = getattr(torch, way, torch.float32) if way.startswith(("bf", "fl")) else torch.float32
        parts = heads(1, 9, 2, 8, dtype) if name == "linear_attention" else [draw(1, 9, 16, dtype=dtype)]
        if name == "modulate":
            parts += [draw(1, 1, 16, seed=seed, dtype=dtype) for seed in (1, 2)]
        return [part.detach().requires_grad_() if way == "gradients" else part for part in parts]

    others = (1e-8,) if name == "linear_attention" else ()
    given, same = inputs(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found, expected = getattr(processor, name)(*given, *others), getattr(reference, name)(*same, *others)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert all(map(torch.equal, given, same)), "nothing is overwritten"
    if way == "gradients":
        losses = found.square().sum(), expected.square().sum()
        assert all(map(torch.equal, *map(torch.autograd.grad, losses, (given, same))))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_computes_and_learns_the_same(qk_norm):
    config = replace(tiny.TRANSFORMER, qk_norm=qk_norm)
    model, other = (tiny.filled(SanaTransformer(config, kernels=one)) for one in (REFERENCE, PROCESSOR))
    x, context = draw(1, config.in_channels, 5, 3), draw(1, 6, config.caption_channels, seed=1)
    timestep = torch.tensor([400.0])
    with torch.no_grad():
        expected, found = (one(x, timestep, context) for one in (model, other))
        truth = model.double()(x.double(), timestep.double(), context.double())
    assert distance(found, truth) <= 1.2 * distance(expected, truth)
    model.float()
    gradients = []
    for one in (model, other):
        loss = one(x, timestep, context).square().sum()
        gradients.append(torch.autograd.grad(loss, list(one.parameters())))
    assert all(map(torch.equal, *gradients))
