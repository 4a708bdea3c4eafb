"""Norms of queries and keys run within the linear attention where they are what torch's are, and else by themselves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sana_core.kernels import REFERENCE
from sana_core.models.layers import LinearAttention
from tests import tiny

CONFIG = replace(tiny.TRANSFORMER, qk_norm=True)


class Seen:
    """Linear attention that keeps the norms it was handed."""

    def __init__(self):
        self.norms = []

    def __call__(self, q, k, v, eps, norms):
        self.norms.append(norms)
        return REFERENCE.linear_attention(q, k, v, eps, norms)


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def attention(seen):
    layer = LinearAttention(CONFIG, nn, replace(REFERENCE, linear_attention=seen))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise / 8)
    return layer


def called(layer, x, perturbed_rows=0):
    """The layer's result with its norms called, as formulas of torch: what it is whoever computes them."""
    rows = len(x) - perturbed_rows
    q, k, v = F.linear(x, layer.qkv.weight).chunk(3, dim=-1)
    q, k = layer.q_norm(q[:rows]), layer.k_norm(k[:rows])
    heads = (part.unflatten(-1, (-1, layer.head_dim)) for part in (q, k, v[:rows]))
    out = torch.cat([REFERENCE.linear_attention(*heads, layer.EPS).flatten(2), v[rows:]])
    return layer.proj(out)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("perturbed_rows", [0, 1, 3])
def test_the_kernel_norms_as_the_modules_do(attention, seen, perturbed_rows):
    x = draw(3, 7, CONFIG.hidden_size).requires_grad_()
    inputs, results = [x, *attention.parameters()], []
    for run in (attention, lambda *args: called(attention, *args)):
        out = run(x, perturbed_rows)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    (norms,) = seen.norms
    assert norms.q_weight is attention.q_norm.weight and norms.k_weight is attention.k_norm.weight
    assert norms.eps == 1e-5


def test_a_model_without_norms_hands_none(seen):
    layer = LinearAttention(tiny.TRANSFORMER, nn, replace(REFERENCE, linear_attention=seen))
    layer(draw(1, 5, CONFIG.hidden_size))
    assert seen.norms == [None]


class Opposite(nn.RMSNorm):
    def forward(self, x):
        return -super().forward(x)


def inherited(layer, name):
    setattr(layer, name, Opposite(CONFIG.hidden_size, eps=1e-5))


def hooked(layer, name):
    getattr(layer, name).register_forward_hook(lambda module, args, out: -out)


def hooked_before(layer, name):
    getattr(layer, name).register_forward_pre_hook(lambda module, args: (-args[0],))


def with_its_own_forward(layer, name):
    norm = getattr(layer, name)
    norm.forward = lambda x: -nn.RMSNorm.forward(norm, x)


def without_weight(layer, name):
    setattr(layer, name, nn.RMSNorm(CONFIG.hidden_size, eps=1e-5, elementwise_affine=False))


def with_another_eps(layer, name):
    getattr(layer, name).eps = 0.1


def replaced(layer, name):
    setattr(layer, name, nn.LayerNorm(CONFIG.hidden_size))


def wide(layer, name):
    getattr(layer, name).double()


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize(
    "change",
    [inherited, hooked, hooked_before, with_its_own_forward, without_weight, with_another_eps, replaced, wide],
    ids=lambda change: change.__name__,
)
def test_norms_that_do_something_else_are_called(attention, seen, change, name):
    x = draw(2, 7, CONFIG.hidden_size)
    change(attention, name)
    out = attention(x)
    assert seen.norms == [None] and torch.equal(out, called(attention, x))


def test_gradients_that_are_listened_for_are_still_seen(attention, seen):
    calls = []
    attention.k_norm.register_full_backward_hook(lambda *args: calls.append(args))
    attention(draw(1, 5, CONFIG.hidden_size)).sum().backward()
    assert seen.norms == [None] and len(calls) == 1


def test_under_autocast_the_norms_are_called(attention, seen):
    x = draw(1, 5, CONFIG.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        attention(x)
    assert seen.norms == [None]


def test_a_weight_that_is_computed_is_handed_as_computed(attention, seen):
    attention.k_norm = weight_norm(attention.k_norm, dim=None)
    x = draw(1, 5, CONFIG.hidden_size)
    assert torch.allclose(attention(x), called(attention, x), rtol=1e-5, atol=1e-6)
    attention(x).sum().backward()
    assert seen.norms[0] is not None
    assert attention.k_norm.parametrizations.weight.original1.grad.abs().max() > 0


def test_compiles_in_one_graph(attention):
    attention.kernels = REFERENCE
    x = draw(2, 6, CONFIG.hidden_size)
    assert torch.allclose(torch.compile(attention, backend="eager", fullgraph=True)(x), attention(x), atol=1e-6)
