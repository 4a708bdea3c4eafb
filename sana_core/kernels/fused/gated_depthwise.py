"""SiLU, depthwise 3x3 convolution with bias, gated linear unit (`reference.gated_depthwise`), channels last.

A program walks down a strip of the picture. Each row is loaded three times, shifted by a column, and counts towards
the output rows above, at and below it; so the SiLU is computed three times and not nine, and nothing is written but
the output. Between the steps all is float32, where PyTorch rounds to the dtype of x twice.

With s = silu(x), y = conv(s), value u and gate t the halves of y, and the gradient g of u silu(t):

    du = g silu(t)    dt = g u silu'(t)    ds = conv of dy with the mirrored weight    dx = ds silu'(x)
    dweight[i, j] = sum over pixels of s[y, x] dy[y - i + 1, x - j + 1]    dbias = sum over pixels of dy

Shapes: B batch, C channels of the result, h and w the size of the picture.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .launch import alike, device_of, rounded, runs_here, tracked

COLUMNS = 8  # of the picture, and
CHANNELS = 64  # that a program computes at once
STRIP = 16  # rows of the picture that a program walks down
WARPS = 4


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def _tile(row, left, columns, channels, h, w, limit, width):
    """Offsets [COLUMNS, CHANNELS] into a picture [h, w, width] at a row, and which of them are in it."""
    x = left + columns
    mask = ((x >= 0) & (x < w) & (row >= 0) & (row < h))[:, None] & (channels < limit)[None, :]
    return (row * w + x).to(tl.int64)[:, None] * width + channels[None, :], mask


@triton.jit
def _load_silu(x_ptr, row, left, columns, channels, h, w, limit, width):
    offsets, mask = _tile(row, left, columns, channels, h, w, limit, width)
    return _silu(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def _load(x_ptr, row, left, columns, channels, h, w, limit, width):
    offsets, mask = _tile(row, left, columns, channels, h, w, limit, width)
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight_ptr, channels, index: tl.constexpr, limit):
    """One of the nine weights of each channel [1, CHANNELS]."""
    return tl.load(weight_ptr + channels * 9 + index, mask=channels < limit, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _row(weight_ptr, channels, limit, left, middle, right, row: tl.constexpr):
    """What a picture's row adds to an output row through row `row` of the weight."""
    return (
        _tap(weight_ptr, channels, 3 * row, limit) * left
        + _tap(weight_ptr, channels, 3 * row + 1, limit) * middle
        + _tap(weight_ptr, channels, 3 * row + 2, limit) * right
    )


@triton.jit
def _glu_kernel(
    x_ptr, weight_ptr, bias_ptr, g_ptr, out_ptr,
    h, w, C, blocks_across,
    GRADIENT: tl.constexpr, STRIP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The result [h, w, C] of one strip, or given its gradient that of y [h, w, 2C].

    Programs: (strips * blocks across, blocks of channels, B).
    """
    top = (tl.program_id(0) // blocks_across) * STRIP
    left = (tl.program_id(0) % blocks_across) * COLUMNS
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * h * w * 2 * C
    out_ptr += batch * h * w * C * (2 if GRADIENT else 1)
    g_ptr += batch * h * w * C
    columns = tl.arange(0, COLUMNS)
    values = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gates = C + values
    value_limit = C
    value_bias = tl.load(bias_ptr + values, mask=values < C, other=0.0).to(tl.float32)[None, :]
    gate_bias = tl.load(bias_ptr + gates, mask=values < C, other=0.0).to(tl.float32)[None, :]
    gate_limit = tl.where(values < C, 2 * C, 0)
    value_above = tl.zeros((COLUMNS, CHANNELS), tl.float32)  # output row above the one just loaded, so far
    value_here = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    gate_above = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    gate_here = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for step in range(STRIP + 2):
        row = top - 1 + step
        a = _load_silu(x_ptr, row, left - 1, columns, values, h, w, value_limit, 2 * C)
        b = _load_silu(x_ptr, row, left, columns, values, h, w, value_limit, 2 * C)
        c = _load_silu(x_ptr, row, left + 1, columns, values, h, w, value_limit, 2 * C)
        value = value_above + _row(weight_ptr, values, value_limit, a, b, c, 2) + value_bias
        value_above = value_here + _row(weight_ptr, values, value_limit, a, b, c, 1)
        value_here = _row(weight_ptr, values, value_limit, a, b, c, 0)
        a = _load_silu(x_ptr, row, left - 1, columns, gates, h, w, gate_limit, 2 * C)
        b = _load_silu(x_ptr, row, left, columns, gates, h, w, gate_limit, 2 * C)
        c = _load_silu(x_ptr, row, left + 1, columns, gates, h, w, gate_limit, 2 * C)
        gate = gate_above + _row(weight_ptr, gates, gate_limit, a, b, c, 2) + gate_bias
        gate_above = gate_here + _row(weight_ptr, gates, gate_limit, a, b, c, 1)
        gate_here = _row(weight_ptr, gates, gate_limit, a, b, c, 0)

        offsets, mask = _tile(row - 1, left, columns, values, h, w, value_limit, C)
        mask = mask & (step > 1)
        if GRADIENT:
            g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            offsets, _ = _tile(row - 1, left, columns, values, h, w, value_limit, 2 * C)
            tl.store(out_ptr + offsets, rounded(g * _silu(gate), out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + C + offsets, rounded(g * value * _silu_slope(gate), out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(out_ptr + offsets, rounded(value * _silu(gate), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _input_gradient_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    h, w, C, blocks_across,
    STRIP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx [h, w, C] of one strip, and its share of dweight [9, C] and dbias [C]; here C counts both halves.

    Programs as for the result.
    """
    top = (tl.program_id(0) // blocks_across) * STRIP
    left = (tl.program_id(0) % blocks_across) * COLUMNS
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * h * w * C
    dy_ptr += batch * h * w * C
    dx_ptr += batch * h * w * C
    columns = tl.arange(0, COLUMNS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    ds_above = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    ds_here = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    s_above = tl.zeros((COLUMNS, CHANNELS), tl.float32)  # zero outside of the strip, whose share this is
    s_here = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    w0 = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    w1, w2, w3, w4, w5, w6, w7, w8, bias = w0, w0, w0, w0, w0, w0, w0, w0, w0
    for step in range(STRIP + 2):
        row = top - 1 + step
        a = _load(dy_ptr, row, left - 1, columns, channels, h, w, C, C)
        b = _load(dy_ptr, row, left, columns, channels, h, w, C, C)
        c = _load(dy_ptr, row, left + 1, columns, channels, h, w, C, C)
        # mirrored: what is to the left of a pixel reads it through the weight's right column
        ds = ds_above + _row(weight_ptr, channels, C, c, b, a, 0)
        ds_above = ds_here + _row(weight_ptr, channels, C, c, b, a, 1)
        ds_here = _row(weight_ptr, channels, C, c, b, a, 2)
        below = tl.where(step < STRIP, row + 1, h)
        s_below = _load_silu(x_ptr, below, left, columns, channels, h, w, C, C)
        w0 += s_above * c
        w1 += s_above * b
        w2 += s_above * a
        w3 += s_here * c
        w4 += s_here * b
        w5 += s_here * a
        w6 += s_below * c
        w7 += s_below * b
        w8 += s_below * a
        bias += tl.where((step > 0) & (step <= STRIP), b, 0.0)
        s_above = s_here
        s_here = s_below

        offsets, mask = _tile(row - 1, left, columns, channels, h, w, C, C)
        mask = mask & (step > 1)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, rounded(ds * _silu_slope(x), dx_ptr.dtype.element_ty), mask=mask)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    mask = channels < C
    tl.store(dbias_ptr + part * C + channels, tl.sum(bias, 0), mask=mask)
    target = dweight_ptr + (part * C + channels) * 9
    tl.store(target, tl.sum(w0, 0), mask=mask)
    tl.store(target + 1, tl.sum(w1, 0), mask=mask)
    tl.store(target + 2, tl.sum(w2, 0), mask=mask)
    tl.store(target + 3, tl.sum(w3, 0), mask=mask)
    tl.store(target + 4, tl.sum(w4, 0), mask=mask)
    tl.store(target + 5, tl.sum(w5, 0), mask=mask)
    tl.store(target + 6, tl.sum(w6, 0), mask=mask)
    tl.store(target + 7, tl.sum(w7, 0), mask=mask)
    tl.store(target + 8, tl.sum(w8, 0), mask=mask)


def _launch_glu(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor | None) -> Tensor:
    """The result [B, C, h, w], or for its gradient the gradient [B, 2C, h, w] of the convolution's output."""
    batch, channels, h, w = x.shape
    half = channels // 2
    shape = (batch, half if gradient is None else channels, h, w)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    across = triton.cdiv(w, COLUMNS)
    with device_of(x):
        _glu_kernel[triton.cdiv(h, STRIP) * across, triton.cdiv(half, CHANNELS), batch](
            x, weight, bias, x if gradient is None else gradient, out,
            h, w, half, across,
            GRADIENT=gradient is not None, STRIP=STRIP, COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _backward(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    batch, channels, h, w = x.shape
    dy = _launch_glu(x, weight, bias, gradient.contiguous(memory_format=torch.channels_last))
    across = triton.cdiv(w, COLUMNS)
    programs = triton.cdiv(h, STRIP) * across
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    dweight = torch.empty((batch * programs, *weight.shape), dtype=torch.float32, device=x.device)
    dbias = torch.empty((batch * programs, channels), dtype=torch.float32, device=x.device)
    with device_of(x):
        _input_gradient_kernel[programs, triton.cdiv(channels, CHANNELS), batch](
            x, weight, dy, dx, dweight, dbias,
            h, w, channels, across, STRIP=STRIP, COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _launch_glu(x, weight, bias, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _backward(*ctx.saved_tensors, gradient)


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.gated_depthwise`, fused; the result is in channels-last layout."""
    known = bias is not None and weight.shape == (x.shape[1], 1, 3, 3)
    if not (known and runs_here(x, weight, bias) and alike(x, weight, bias)):
        return reference.gated_depthwise(x, weight, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    return _GatedDepthwise.apply(x, weight, bias) if tracked(x, weight, bias) else _launch_glu(x, weight, bias, None)
