"""Layer norm without weights, then scale and shift (`reference.modulate`): a row is read once and written once.

With y = x^ (1 + scale) + shift, x^ = (x - mean) r and h = g (1 + scale), for the gradient g of y:

    dx = r (h - mean(h) - x^ mean(h x^))    dscale = sum over tokens of g x^    dshift = sum over tokens of g

Shapes: B batch, N tokens, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .launch import alike, device_of, rounded, runs_here, tracked, with_dense_rows

WIDEST_ROW = 8192  # channels; a row stays in the registers of one program
FEWEST_ROWS = 8  # that a program of the backward pass sums up
MOST_PARTS = 128  # of the tokens of one row of the batch
ELEMENTS_PER_THREAD = 16


@triton.jit
def _normalised(x, channels, C, eps):
    """x^ and r of one row; x is zero beyond C."""
    centred = tl.where(channels < C, x - tl.sum(x) / C, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    return centred * inverse, inverse


@triton.jit
def _modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr,
    x_batch, x_row, shift_batch, scale_batch,
    N, C, eps, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token; programs: (N, B)."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    mask = channels < C
    x = tl.load(x_ptr + batch * x_batch + token * x_row + channels, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + channels, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_batch + channels, mask=mask, other=0.0).to(tl.float32)
    normed, _ = _normalised(x, channels, C, eps)
    out = rounded(normed * (1 + scale) + shift, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (batch * N + token) * C + channels, out, mask=mask)


@triton.jit
def _gradient_kernel(
    x_ptr, scale_ptr, g_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    x_batch, x_row, scale_batch, g_batch, g_row,
    N, C, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx of ROWS tokens, and their share of dshift and dscale; programs: (parts, B)."""
    part = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    scale = tl.load(scale_ptr + batch * scale_batch + channels, mask=channels < C, other=0.0).to(tl.float32)
    dshift = tl.zeros((WIDTH,), tl.float32)
    dscale = tl.zeros((WIDTH,), tl.float32)
    for row in range(ROWS):
        token = part * ROWS + row
        mask = (channels < C) & (token < N)
        x = tl.load(x_ptr + batch * x_batch + token * x_row + channels, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + batch * g_batch + token * g_row + channels, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = _normalised(x, channels, C, eps)
        h = g * (1 + scale)
        dx = inverse * (h - tl.sum(h) / C - normed * (tl.sum(h * normed) / C))
        tl.store(dx_ptr + (batch * N + token) * C + channels, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
        dshift += g
        dscale += g * normed
    target = (part * tl.num_programs(1) + batch) * C + channels
    tl.store(dshift_ptr + target, dshift, mask=channels < C)
    tl.store(dscale_ptr + target, dscale, mask=channels < C)


def _rows_per_part(tokens: int) -> int:
    """How many tokens a program sums up: a power of two, as each count is compiled for itself."""
    return triton.next_power_of_2(max(FEWEST_ROWS, triton.cdiv(tokens, MOST_PARTS)))


def _warps(width: int) -> int:
    return max(1, min(16, width // (32 * ELEMENTS_PER_THREAD)))


def _forward(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(channels)
    with device_of(x):
        _modulate_kernel[tokens, batch](
            x, shift, scale, out, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
            tokens, channels, reference.MODULATE_EPS, WIDTH=width, num_warps=_warps(width),
        )  # fmt: skip
    return out


def _backward(x: Tensor, scale: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    batch, tokens, channels = x.shape
    gradient = with_dense_rows(gradient)
    rows = _rows_per_part(tokens)
    parts = triton.cdiv(tokens, rows)
    dx = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    dshift = torch.empty((parts, batch, 1, channels), dtype=torch.float32, device=x.device)
    dscale = torch.empty_like(dshift)
    width = triton.next_power_of_2(channels)
    with device_of(x):
        _gradient_kernel[parts, batch](
            x, scale, gradient, dx, dshift, dscale,
            x.stride(0), x.stride(1), scale.stride(0), gradient.stride(0), gradient.stride(1),
            tokens, channels, reference.MODULATE_EPS, WIDTH=width, ROWS=rows, num_warps=_warps(width),
        )  # fmt: skip
    return dx, dshift.sum(0).to(x.dtype), dscale.sum(0).to(x.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale):
        ctx.save_for_backward(x, scale)
        return _forward(x, shift, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _backward(*ctx.saved_tensors, gradient)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`reference.modulate`, fused."""
    known = x.ndim == 3 and shift.shape == scale.shape == (len(x), 1, x.shape[-1]) and x.shape[-1] <= WIDEST_ROW
    if not (known and runs_here(x, shift, scale) and alike(x, shift, scale)):
        return reference.modulate(x, shift, scale)
    x, shift, scale = (with_dense_rows(tensor) for tensor in (x, shift, scale))
    return _Modulate.apply(x, shift, scale) if tracked(x, shift, scale) else _forward(x, shift, scale)
