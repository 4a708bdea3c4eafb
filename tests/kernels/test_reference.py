"""The specification of the kernels, against the formulas written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from sana_core.kernels import QKNorm, reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_linear_attention_is_normalised_relu_attention():
    q, k, v = (draw(2, 63, 3, 8, seed=seed) for seed in range(3))
    weights = torch.einsum("bnhd,bmhd->bhnm", q.double().relu(), k.double().relu())
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v.double())
    out = reference.linear_attention(q, k, v, 1e-8)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_norms_of_queries_and_keys_take_all_heads_together():
    q, k, v = (draw(2, 63, 3, 8, seed=seed) for seed in range(3))
    weights = [1 + draw(24, seed=seed) for seed in (3, 4)]
    normed = []
    for x, weight in zip((q, k), weights, strict=True):
        x = x.double().flatten(2)
        x = x / (x.square().sum(-1, keepdim=True) / 24 + 1e-5).sqrt() * weight.double()
        normed.append(x.unflatten(2, (3, 8)))
    scores = torch.einsum("bnhd,bmhd->bhnm", *(x.relu() for x in normed))
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / (scores.sum(-1, keepdim=True) + 1e-8), v.double())
    norms = QKNorm(*weights, 1e-5)
    out = reference.linear_attention(q, k, v, 1e-8, norms)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    for found, exact in zip(reference.qk_norm(q, k, norms), normed, strict=True):
        assert found.shape == exact.shape and (found - exact).abs().max() < 1e-6 * exact.abs().max()


def test_linear_attention_keeps_its_state_in_float32():
    """Thousands of tokens overflow a float16 state and stall a bfloat16 one, under autocast as well."""
    q, k, v = (draw(1, 4096, 1, 32, seed=seed).abs() * 8 for seed in range(3))
    expected = reference.linear_attention(q, k, v, 1e-8)
    half = reference.linear_attention(q.half(), k.half(), v.half(), 1e-8)
    assert half.dtype == torch.float16
    assert (half - expected).abs().max() < 2e-3 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.linear_attention(q, k, v, 1e-8), expected)


def test_linear_attention_without_positive_keys_is_zero():
    q, v = draw(1, 5, 1, 4), draw(1, 5, 1, 4, seed=1)
    assert torch.equal(reference.linear_attention(q, -torch.ones_like(q), v, 1e-8), torch.zeros_like(v))


def test_attention_sees_only_what_the_mask_allows():
    q, k, v = draw(2, 7, 3, 8), draw(2, 5, 3, 8, seed=1), draw(2, 5, 3, 8, seed=2)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    out = reference.attention(q, k, v, mask)
    assert torch.allclose(out[1], reference.attention(q[1:], k[1:, :2], v[1:, :2], None)[0], atol=1e-6)
    assert torch.allclose(out[0], reference.attention(q[:1], k[:1], v[:1], None)[0], atol=1e-6)


def test_modulate_is_layer_norm_then_scale_and_shift():
    x, shift, scale = draw(2, 7, 16), draw(2, 1, 16, seed=1), draw(2, 1, 16, seed=2)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale.double()) + shift.double()
    assert (reference.modulate(x, shift, scale) - expected).abs().max() < 1e-5


def test_gated_residual_and_gated_linear_unit():
    x, gate, branch = draw(2, 7, 16), draw(2, 1, 16, seed=1), draw(2, 7, 16, seed=2)
    assert torch.allclose(reference.gated_residual(x, gate, branch), x + gate * branch)
    picture = draw(2, 8, 3, 5)
    assert torch.equal(reference.gated_linear_unit(picture), picture[:, :4] * F.silu(picture[:, 4:]))


def test_gated_depthwise_and_its_gradients():
    picture, weight, bias = draw(2, 8, 3, 5), draw(8, 1, 3, 3, seed=1), draw(8, seed=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (picture, weight, bias)]
    expected = F.conv2d(F.silu(leaves[0]), leaves[1], leaves[2], padding=1, groups=8)
    expected = expected[:, :4] * F.silu(expected[:, 4:])
    tracked = [tensor.clone().requires_grad_() for tensor in (picture, weight, bias)]
    actual = reference.gated_depthwise(*tracked)
    assert torch.equal(actual, expected)
    for found, wanted in zip(
        torch.autograd.grad(actual.sum(), tracked), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(found, wanted)
    channels_last = picture.clone(memory_format=torch.channels_last)
    assert torch.allclose(reference.gated_depthwise(channels_last, weight, bias), expected, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("at_once", [2, 100, 1000])
def test_gated_depthwise_without_gradients(channels, layout, at_once, monkeypatch):
    """At once, some channels at a time, and each on its own."""
    monkeypatch.setattr(reference, "AT_ONCE", at_once)
    picture, weight, bias = draw(2, 2 * channels, 3, 5), draw(2 * channels, 1, 3, 3, seed=1), draw(2 * channels, seed=2)
    expected = F.conv2d(F.silu(picture), weight, bias, padding=1, groups=2 * channels)
    expected = expected[:, :channels] * F.silu(expected[:, channels:])
    weight.requires_grad_()
    with torch.no_grad():
        actual = reference.gated_depthwise(picture.clone(memory_format=layout), weight, bias)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_gated_depthwise_keeps_its_input_for_the_gradient_of_its_weight():
    picture, weight, bias = draw(2, 8, 3, 5), draw(8, 1, 3, 3, seed=1).requires_grad_(), draw(8, seed=2)
    before = picture.clone()
    reference.gated_depthwise(picture, weight, bias).sum().backward()
    assert torch.equal(picture, before)
    assert weight.grad is not None
