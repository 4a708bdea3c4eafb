"""The fused linear attention against float64 and the reference, on a GPU or in Triton's interpreter."""

import sys

import pytest
import torch

from sana_core.kernels import QKNorm, reference
from tests.kernels import fused
from tests.kernels.fused import DTYPES, check, draw, module_of

fused.require_device()
from sana_core.kernels.fused.linear_attention import linear_attention  # noqa: E402

EPS = 1e-8


def qkv(batch, tokens, heads, width=32, dtype=torch.float32):
    """q, k and v [B, N, H, D], views of one projection as in the model."""
    projected = draw(batch, tokens, 3 * heads * width, dtype=dtype).chunk(3, dim=-1)
    return [part.unflatten(-1, (heads, width)) for part in projected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, heads", [(1, 2, 1), (2, 63, 3), (1, 500, 1), (3, 65, 1)])
def test_result_and_gradients(poisoned, batch, tokens, heads, dtype):
    check("linear_attention", linear_attention, qkv(batch, tokens, heads, dtype=dtype), EPS)


@pytest.mark.parametrize(
    "tokens, heads, dtype", [(1000, 1, torch.bfloat16), (20, 36, torch.float32), (5, 70, torch.float16)]
)
def test_sizes_of_the_models(poisoned, tokens, heads, dtype):
    check("linear_attention", linear_attention, qkv(1, tokens, heads, dtype=dtype), EPS)


def test_more_tokens_than_the_smallest_parts_hold(poisoned, monkeypatch):
    """Parts of several blocks, as a 4K picture has, and a number of them that is no power of two."""
    module = module_of(linear_attention)
    monkeypatch.setattr(module, "MOST_PARTS", 3)
    monkeypatch.setattr(module, "SMALLEST_PART", module.BLOCK)
    assert module._parts(330) == (3, 2)
    check("linear_attention", linear_attention, qkv(1, 330, 1), EPS)


@pytest.mark.parametrize("width", [8, 24])
def test_heads_that_do_not_fill_a_block(poisoned, width):
    check("linear_attention", linear_attention, qkv(2, 70, 2, width), EPS)


def test_inputs_of_any_layout(poisoned):
    q, k, v = qkv(2, 66, 2)
    q = q.transpose(1, 3).contiguous().transpose(1, 3)  # neighbours of a row are apart
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    check("linear_attention", linear_attention, [q, k, v], EPS, gradient=draw(1, 1, 1, 1).expand(2, 66, 2, 32))


def test_state_holds_what_overflows_float16():
    q, k, v = (draw(1, 600, 1, 32, seed=seed).abs() * 12 for seed in range(3))
    expected = linear_attention(q, k, v, EPS)
    found = linear_attention(q.half(), k.half(), v.half(), EPS)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def test_without_positive_keys_or_queries_the_result_is_zero():
    q, k, v = qkv(1, 40, 1)
    for queries, keys in ((q, -k.abs()), (-q.abs(), k)):
        found = fused.run(linear_attention, [queries, keys, v], draw(1, 40, 1, 32), EPS)
        assert torch.equal(found[0], torch.zeros_like(v))
        assert all(part.isfinite().all() for part in found)


def test_a_row_does_not_depend_on_its_neighbours_in_the_batch():
    q, k, v = qkv(3, 100, 2)
    alone = linear_attention(q[1:2], k[1:2], v[1:2], EPS)
    assert torch.equal(linear_attention(q, k, v, EPS)[1:2], alone)


def test_keys_and_values_of_different_dtypes(poisoned):
    """A norm leaves q and k in float32 where v is narrow."""
    q, k, v = qkv(1, 70, 1)
    found = linear_attention(q, k, v.bfloat16(), EPS)
    assert found.dtype == torch.bfloat16
    assert (found - linear_attention(q, k, v.bfloat16().float(), EPS)).abs().max() < 2**-7


def with_norms(function):
    """Linear attention as a function of q, k, v and the weights of the norms."""
    return lambda q, k, v, q_weight, k_weight: function(q, k, v, EPS, QKNorm(q_weight, k_weight, 1e-5))


def weights(channels, dtype=torch.float32):
    """Of two norms: about 1, and some negative."""
    return [1 + draw(channels, dtype=dtype, seed=seed) for seed in (3, 4)]


def check_normed(projected, weights, **kwargs):
    return check("linear_attention", linear_attention, [*projected, *weights], arrange=with_norms, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, heads", [(1, 2, 1), (2, 63, 3), (1, 500, 1)])
def test_norms_of_queries_and_keys(poisoned, batch, tokens, heads, dtype):
    check_normed(qkv(batch, tokens, heads, dtype=dtype), weights(32 * heads, dtype))


@pytest.mark.parametrize(
    "tokens, heads, dtype", [(1000, 1, torch.bfloat16), (9, 36, torch.float32), (5, 70, torch.float16)]
)
def test_norms_in_the_sizes_of_the_models(poisoned, tokens, heads, dtype):
    check_normed(qkv(1, tokens, heads, dtype=dtype), weights(32 * heads, dtype))


def test_norms_of_heads_that_do_not_fill_a_block(poisoned):
    check_normed(qkv(2, 70, 3, 24), weights(72))


def test_norms_of_inputs_of_any_layout(poisoned):
    q, k, v = qkv(2, 40, 2)
    q = q.transpose(1, 3).contiguous().transpose(1, 3)  # neighbours of a row are apart
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # heads are
    spread = [torch.stack([part, part], dim=1)[:, 0] for part in weights(64)]
    check_normed([q, k, v], spread, gradient=draw(1, 1, 1, 1).expand(2, 40, 2, 32))


def test_norms_in_parts_of_several_blocks(poisoned, monkeypatch):
    """Of the attention's tokens, and of the rows whose gradients one program of the norms sums up."""
    attention, norms = module_of(linear_attention), sys.modules[module_of(linear_attention).inverse_rms.__module__]
    monkeypatch.setattr(attention, "MOST_PARTS", 3)
    monkeypatch.setattr(attention, "SMALLEST_PART", attention.BLOCK)
    monkeypatch.setattr(norms, "BLOCK", 64)
    monkeypatch.setattr(norms, "MOST_PARTS", 3)
    check_normed(qkv(2, 165, 1), weights(32))


def test_norms_give_the_same_bits_again():
    inputs, gradient = [*qkv(2, 70, 2, dtype=torch.bfloat16), *weights(64, torch.bfloat16)], draw(2, 70, 2, 32)
    first, second = (fused.run(with_norms(linear_attention), inputs, gradient.bfloat16()) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_normed_row_does_not_depend_on_its_neighbours_in_the_batch():
    projected, both = qkv(3, 70, 2), weights(64)
    alone = with_norms(linear_attention)(*(part[1:2] for part in projected), *both)
    assert torch.equal(with_norms(linear_attention)(*projected, *both)[1:2], alone)


def test_normed_queries_are_not_rounded():
    """In 16 bits plain PyTorch rounds them as well as the keys, so that it is further from the truth."""
    inputs = [*qkv(1, 200, 2, dtype=torch.bfloat16), *weights(64, torch.bfloat16)]
    truth = with_norms(fused.EXACT["linear_attention"])(*(value.double() for value in inputs))
    wide = with_norms(linear_attention)(*(value.float() for value in inputs))
    found, plain = (with_norms(function)(*inputs) for function in (linear_attention, reference.linear_attention))
    assert fused.distance(wide, truth) < 1e-6
    assert fused.distance(found, truth) < 0.95 * fused.distance(plain, truth)


def test_norms_that_do_not_fit_are_refused():
    """Not read past their end."""
    with pytest.raises(RuntimeError, match="normalized_shape"):
        with_norms(linear_attention)(*qkv(1, 5, 2), *weights(32))


def test_rows_too_wide_for_the_norms_take_the_reference(monkeypatch):
    monkeypatch.setattr(module_of(linear_attention), "WIDEST_ROW", 32)
    inputs = [*qkv(1, 5, 2), *weights(64)]
    expected = with_norms(reference.linear_attention)(*inputs)
    assert torch.equal(with_norms(linear_attention)(*inputs), expected)


@pytest.mark.parametrize("normed", [False, True])
def test_what_is_not_a_number_is_not_hidden(normed):
    """The reference's ReLU hands NaN on, and so the sampler can report it."""
    function = with_norms(linear_attention) if normed else lambda q, k, v, *_: linear_attention(q, k, v, EPS)
    for place in (0, 1):
        inputs = [*qkv(1, 5, 2), *weights(64)]
        inputs[place] = inputs[place].clone()
        inputs[place][0, 2, 1, 7] = torch.nan
        found = function(*inputs).isnan()
        assert found[0, 2, 1].all() if place == 0 else found[0, :, 1].all()
