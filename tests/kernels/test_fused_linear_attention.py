"""The fused linear attention against float64 and the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

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
