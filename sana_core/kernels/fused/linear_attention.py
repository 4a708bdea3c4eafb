"""ReLU linear attention (`reference.linear_attention`) in two passes forward and two backward.

Tokens are split into parts. The first pass sums up each part's state, K^T V and the sum of K, in float32; the second
adds the parts in a fixed order, multiplies the queries with the sum and normalises. Nothing but the output and the
partial states is written, and there are no atomic additions: a replay is bit-equal. The parts depend on the number
of tokens alone, so that a row of a batch does not depend on its neighbours.

With q' = relu(q), k' = relu(k), S = K'^T V, z = sum of k', n = q' S and d = q' z + eps the output is n / d. From its
gradient g follow a = g / d and c = -(a . n) / d, and from them

    dq' = a S^T + c z    dS = q'^T a    dz = sum of c q'    dk' = v dS^T + dz    dv = k' dS

Where q and k have norms, they are normed as they are loaded; `qk_norm` has the rest of it.

Shapes: B batch, N tokens, H heads, D head width, P parts. Programs: (B * H, P).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..reference import QKNorm
from .launch import INTERPRETED, device_of, dot_precision, rounded, runs_here, tracked, with_dense_rows
from .qk_norm import WIDEST_ROW, inverse_rms, norm_gradients

BLOCK = 64  # tokens that a program loads at once
SMALLEST_PART = 256  # tokens; less would read the partial states more often than it saves
MOST_PARTS = 16
WARPS = 4
WIDEST_HEAD = 128  # the state of a wider head does not fit into the registers


class RowNorm(NamedTuple):
    """The RMS norm of q or of k, as the kernels apply it."""

    inverse: Tensor | None  # [B, N], 1 / rms of the rows, float32
    weight: Tensor | None  # [C]


UNNORMED = RowNorm(None, None)


@triton.jit
def _load_rows(base, row_stride, rows, columns, N, D: tl.constexpr):
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, row_stride, rows, columns, N, D: tl.constexpr, values):
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    target = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(target, rounded(values, base.dtype.element_ty), mask=mask)


@triton.jit
def _load_positive(base, row_stride, rows, columns, N, D: tl.constexpr, inverse_ptr, weight_ptr, head, H):
    """relu of rows of q or k, after their norm where there is one; `head` counts the heads of the whole batch."""
    x = _load_rows(base, row_stride, rows, columns, N, D)
    if weight_ptr is not None:
        inverse = tl.load(inverse_ptr + (head // H) * N + rows, mask=rows < N, other=0.0)
        weight = tl.load(weight_ptr + (head % H) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * inverse[:, None] * weight[None, :]
    return tl.where(x < 0, tl.zeros_like(x), x)  # NaN stays, for whoever looks for it


@triton.jit
def _store_state(states_ptr, totals_ptr, slot, state, total, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes one part's state [D, D] and total [D]; `slot` counts them."""
    columns = tl.arange(0, WIDTH)
    _store_rows(states_ptr + slot * D * D, D, columns, columns, D, D, state)
    tl.store(totals_ptr + slot * D + columns, total, mask=columns < D)


@triton.jit
def _sum_parts(states_ptr, totals_ptr, head, heads, parts, MOST: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The state [WIDTH, WIDTH] and total [WIDTH] of all tokens."""
    columns = tl.arange(0, WIDTH)
    state = tl.zeros((WIDTH, WIDTH), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(MOST):  # unrolled: the loads do not wait for each other
        slot = part * heads + head
        limit = tl.where(part < parts, D, 0)
        state += _load_rows(states_ptr + slot * D * D, D, columns, columns, limit, D)
        total += tl.load(totals_ptr + slot * D + columns, mask=columns < limit, other=0.0)
    return state, total


@triton.jit
def _state_kernel(
    k_ptr, v_ptr, k_inverse_ptr, k_weight_ptr, states_ptr, totals_ptr,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    N, H,
    STEPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Pass 1: state and total of one part of one head."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k_ptr += (head // H) * k_batch + (head % H) * k_head
    v_ptr += (head // H) * v_batch + (head % H) * v_head
    columns = tl.arange(0, WIDTH)
    state = tl.zeros((WIDTH, WIDTH), tl.float32)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        k = _load_positive(k_ptr, k_row, rows, columns, N, D, k_inverse_ptr, k_weight_ptr, head, H)
        if k_weight_ptr is not None:  # rounded as a norm writes them: a product in float32 takes three in 16 bits
            k = rounded(k, k_ptr.dtype.element_ty)
        v = _load_rows(v_ptr, v_row, rows, columns, N, D)
        sums += k.to(tl.float32)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
    slot = part * tl.num_programs(0).to(tl.int64) + head
    _store_state(states_ptr, totals_ptr, slot, state, tl.sum(sums, 0), D, WIDTH)


@triton.jit
def _output_kernel(
    q_ptr, q_inverse_ptr, q_weight_ptr, states_ptr, totals_ptr, out_ptr,
    q_batch, q_row, q_head, out_batch, out_row, out_head,
    N, H, parts, eps,
    MOST: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 2: the output of one part of the queries."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_ptr += (head // H) * q_batch + (head % H) * q_head
    out_ptr += (head // H) * out_batch + (head % H) * out_head
    columns = tl.arange(0, WIDTH)
    state, total = _sum_parts(states_ptr, totals_ptr, head, tl.num_programs(0), parts, MOST, D, WIDTH)
    for step in range(STEPS):
        rows = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        q = _load_positive(q_ptr, q_row, rows, columns, N, D, q_inverse_ptr, q_weight_ptr, head, H).to(tl.float32)
        normaliser = tl.sum(q * total[None, :], 1) + eps
        out = tl.dot(q, state, input_precision=PRECISION) / normaliser[:, None]
        _store_rows(out_ptr, out_row, rows, columns, N, D, out)


@triton.jit
def _query_gradient_kernel(
    q_ptr, q_inverse_ptr, q_weight_ptr, g_ptr, states_ptr, totals_ptr,
    dq_ptr, state_gradients_ptr, total_gradients_ptr,
    q_batch, q_row, q_head, g_batch, g_row, g_head, dq_batch, dq_row, dq_head,
    N, H, parts, eps,
    MOST: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward pass 1: dq (of normed q), and one part's share of the gradients of state and total."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_ptr += (head // H) * q_batch + (head % H) * q_head
    g_ptr += (head // H) * g_batch + (head % H) * g_head
    dq_ptr += (head // H) * dq_batch + (head % H) * dq_head
    columns = tl.arange(0, WIDTH)
    state, total = _sum_parts(states_ptr, totals_ptr, head, tl.num_programs(0), parts, MOST, D, WIDTH)
    state_gradient = tl.zeros((WIDTH, WIDTH), tl.float32)
    total_gradients = tl.zeros((BLOCK, WIDTH), tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        q = _load_positive(q_ptr, q_row, rows, columns, N, D, q_inverse_ptr, q_weight_ptr, head, H).to(tl.float32)
        normaliser = tl.sum(q * total[None, :], 1) + eps
        # Divided first: a product with g would overflow where the normaliser is large, and underflow where it is not.
        out = tl.dot(q, state, input_precision=PRECISION) / normaliser[:, None]
        a = _load_rows(g_ptr, g_row, rows, columns, N, D).to(tl.float32) / normaliser[:, None]
        c = -tl.sum(a * out, 1)
        dq = tl.dot(a, tl.trans(state), input_precision=PRECISION) + c[:, None] * total[None, :]
        _store_rows(dq_ptr, dq_row, rows, columns, N, D, tl.where(q > 0, dq, 0.0))
        state_gradient = tl.dot(tl.trans(q), a, state_gradient, input_precision=PRECISION)
        total_gradients += c[:, None] * q
    slot = part * tl.num_programs(0).to(tl.int64) + head
    total_gradient = tl.sum(total_gradients, 0)
    _store_state(state_gradients_ptr, total_gradients_ptr, slot, state_gradient, total_gradient, D, WIDTH)


@triton.jit
def _key_value_gradient_kernel(
    k_ptr, v_ptr, k_inverse_ptr, k_weight_ptr, state_gradients_ptr, total_gradients_ptr, dk_ptr, dv_ptr,
    k_batch, k_row, k_head, v_batch, v_row, v_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    N, H, parts,
    MOST: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward pass 2: dk (of normed k) and dv of one part."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k_ptr += (head // H) * k_batch + (head % H) * k_head
    v_ptr += (head // H) * v_batch + (head % H) * v_head
    dk_ptr += (head // H) * dk_batch + (head % H) * dk_head
    dv_ptr += (head // H) * dv_batch + (head % H) * dv_head
    columns = tl.arange(0, WIDTH)
    state_gradient, total_gradient = _sum_parts(
        state_gradients_ptr, total_gradients_ptr, head, tl.num_programs(0), parts, MOST, D, WIDTH
    )
    for step in range(STEPS):
        rows = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        k = _load_positive(k_ptr, k_row, rows, columns, N, D, k_inverse_ptr, k_weight_ptr, head, H).to(tl.float32)
        v = _load_rows(v_ptr, v_row, rows, columns, N, D).to(tl.float32)
        dk = tl.dot(v, tl.trans(state_gradient), input_precision=PRECISION) + total_gradient[None, :]
        _store_rows(dk_ptr, dk_row, rows, columns, N, D, tl.where(k > 0, dk, 0.0))
        _store_rows(dv_ptr, dv_row, rows, columns, N, D, tl.dot(k, state_gradient, input_precision=PRECISION))


def _parts(tokens: int) -> tuple[int, int]:
    """Number of the parts, and how many blocks each has: powers of two, as each count is compiled for itself."""
    length = max(BLOCK, triton.cdiv(tokens, MOST_PARTS), min(SMALLEST_PART, tokens))
    length = triton.next_power_of_2(length)
    return triton.cdiv(tokens, length), length // BLOCK


def _constants(*tensors: Tensor) -> dict:
    width = tensors[0].shape[-1]
    return {
        "D": width,
        "WIDTH": max(16, triton.next_power_of_2(width)),  # tl.dot takes no less than 16
        "BLOCK": BLOCK,
        "PRECISION": dot_precision(*tensors),
        "num_warps": WARPS,
    }


def _empty_states(like: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = like.shape
    states = torch.empty(parts, batch * heads, width, width, dtype=torch.float32, device=like.device)
    return states, torch.empty(parts, batch * heads, width, dtype=torch.float32, device=like.device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, eps: float, q_norm: RowNorm = UNNORMED, k_norm: RowNorm = UNNORMED
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, N, H, D], and the states [P, B * H, D, D] and totals [P, B * H, D] of the parts."""
    batch, tokens, heads, _ = k.shape
    parts, steps = _parts(tokens)
    states, totals = _empty_states(k, parts)
    query_parts, query_steps = _parts(q.shape[1])
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    with device_of(q):
        _state_kernel[batch * heads, parts](
            k, v, *k_norm, states, totals, *k.stride()[:3], *v.stride()[:3], tokens, heads,
            STEPS=steps, UPCAST=INTERPRETED or k.dtype != v.dtype, **_constants(k, v),
        )  # fmt: skip
        _output_kernel[batch * heads, query_parts](
            q, *q_norm, states, totals, out, *q.stride()[:3], *out.stride()[:3],
            q.shape[1], heads, parts, eps,
            MOST=triton.next_power_of_2(parts), STEPS=query_steps, **_constants(q),
        )  # fmt: skip
    return out, states, totals


def _backward(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor, totals: Tensor, eps: float, gradient: Tensor,
    q_norm: RowNorm = UNNORMED, k_norm: RowNorm = UNNORMED,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; where q and k have norms, of the normed ones, in float32."""
    batch, tokens, heads, _ = k.shape
    gradient = with_dense_rows(gradient)
    query_parts, query_steps = _parts(q.shape[1])
    state_gradients, total_gradients = _empty_states(k, query_parts)
    dq, dk = (
        torch.empty(x.shape, dtype=x.dtype if norm.weight is None else torch.float32, device=x.device)
        for x, norm in ((q, q_norm), (k, k_norm))
    )
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    parts, steps = _parts(tokens)
    with device_of(q):
        _query_gradient_kernel[batch * heads, query_parts](
            q, *q_norm, gradient, states, totals, dq, state_gradients, total_gradients,
            *q.stride()[:3], *gradient.stride()[:3], *dq.stride()[:3],
            q.shape[1], heads, parts, eps,
            MOST=triton.next_power_of_2(parts), STEPS=query_steps, **_constants(q, gradient),
        )  # fmt: skip
        _key_value_gradient_kernel[batch * heads, parts](
            k, v, *k_norm, state_gradients, total_gradients, dk, dv,
            *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            tokens, heads, query_parts,
            MOST=triton.next_power_of_2(query_parts), STEPS=steps, **_constants(k, v),
        )  # fmt: skip
    return dq, dk, dv


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, eps):
        out, states, totals = _forward(q, k, v, eps)
        ctx.save_for_backward(q, k, v, states, totals)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *_backward(*ctx.saved_tensors, ctx.eps, gradient), None


class _NormedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, eps, q_weight, k_weight, norm_eps):
        q_norm, k_norm = _row_norms(q, k, QKNorm(q_weight, k_weight, norm_eps))
        out, states, totals = _forward(q, k, v, eps, q_norm, k_norm)
        ctx.save_for_backward(q, k, v, states, totals, *q_norm, *k_norm)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, states, totals, *norms = ctx.saved_tensors
        q_norm, k_norm = RowNorm(*norms[:2]), RowNorm(*norms[2:])
        dq, dk, dv = _backward(q, k, v, states, totals, ctx.eps, gradient, q_norm, k_norm)
        dq, dq_weight = norm_gradients(q, *q_norm, dq)
        dk, dk_weight = norm_gradients(k, *k_norm, dk)
        return dq, dk, dv, None, dq_weight, dk_weight, None


def _row_norms(q: Tensor, k: Tensor, norms: QKNorm) -> tuple[RowNorm, RowNorm]:
    q_inverse, k_inverse = inverse_rms(q, k, norms.eps)
    return RowNorm(q_inverse, norms.q_weight), RowNorm(k_inverse, norms.k_weight)


def _normed(q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm) -> Tensor:
    # Heads side by side, as one projection leaves them: then this copies nothing.
    q, k = (with_dense_rows(x.flatten(2)).unflatten(2, x.shape[2:]) for x in (q, k))
    norms = QKNorm(norms.q_weight.contiguous(), norms.k_weight.contiguous(), norms.eps)
    if tracked(q, k, v, *norms[:2]):
        return _NormedLinearAttention.apply(q, k, v, eps, *norms)
    return _forward(q, k, v, eps, *_row_norms(q, k, norms))[0]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm | None = None) -> Tensor:
    """`reference.linear_attention`, fused."""
    weights = [] if norms is None else norms[:2]
    channels = q.shape[-2] * q.shape[-1]
    known = q.shape[-1] <= WIDEST_HEAD and all(x.shape == (channels,) and channels <= WIDEST_ROW for x in weights)
    if not (known and runs_here(q, k, v, *weights)):
        return reference.linear_attention(q, k, v, eps, norms)
    v = with_dense_rows(v)
    if norms is not None:
        return _normed(q, k, v, eps, norms)
    q, k = with_dense_rows(q), with_dense_rows(k)
    return _LinearAttention.apply(q, k, v, eps) if tracked(q, k, v) else _forward(q, k, v, eps)[0]
