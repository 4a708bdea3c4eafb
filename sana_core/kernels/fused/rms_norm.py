"""RMS norm with weight and bias, plus a residual (`reference.rms_norm`): a row is read once and written once.

With y = x^ w + b + residual, x^ = x r and h = g w, for the gradient g of y:

    dx = r (h - x^ mean(h x^))    dw = sum over rows of g x^    db = sum over rows of g    dresidual = g

Shapes: R rows, C channels; programs take blocks of rows, since DC-AE's rows are short and many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .launch import alike, device_of, rounded, runs_here, tracked

WIDEST_ROW = 8192  # channels; rows stay in the registers of one program
BLOCK = 4096  # numbers that a program holds of one map
MOST_PARTS = 512  # of the rows, for each of which weight and bias have gradients of their own at first


@triton.jit
def _normalised(x, C, eps):
    """x^ and r of rows; x is zero beyond C."""
    inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    return x * inverse[:, None], inverse


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    R, C, eps, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows; programs: blocks of rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    mask = (rows < R)[:, None] & (channels < C)[None, :]
    places = rows[:, None] * C + channels[None, :]
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    normed, _ = _normalised(x, C, eps)
    out = normed * weight[None, :] + bias[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, rounded(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_kernel(
    x_ptr, weight_ptr, g_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    R, C, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx of STEPS blocks of ROWS rows, and their share of dweight and dbias; programs: parts."""
    part = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows < R)[:, None] & (channels < C)[None, :]
        places = rows[:, None] * C + channels[None, :]
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + places, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = _normalised(x, C, eps)
        h = g * weight[None, :]
        dx = inverse[:, None] * (h - normed * (tl.sum(h * normed, 1) / C)[:, None])
        tl.store(dx_ptr + places, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(g * normed, 0)
        dbias += tl.sum(g, 0)
    tl.store(dweight_ptr + part * C + channels, dweight, mask=channels < C)
    tl.store(dbias_ptr + part * C + channels, dbias, mask=channels < C)


def _block(channels: int) -> tuple[int, int]:
    """Rows and channels that a program holds, powers of two."""
    width = triton.next_power_of_2(channels)
    return max(1, BLOCK // width), width


def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    x, channels = x.contiguous(), x.shape[-1]
    count = x.numel() // channels
    out = torch.empty_like(x)
    rows, width = _block(channels)
    with device_of(x):
        _rms_norm_kernel[(triton.cdiv(count, rows),)](
            x, weight, bias, x if residual is None else residual.contiguous(), out, count, channels, eps,
            RESIDUAL=residual is not None, ROWS=rows, WIDTH=width, num_warps=4,
        )  # fmt: skip
    return out


def _backward(x: Tensor, weight: Tensor, gradient: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, gradient, channels = x.contiguous(), gradient.contiguous(), x.shape[-1]
    count = x.numel() // channels
    rows, width = _block(channels)
    steps = triton.next_power_of_2(triton.cdiv(count, rows * MOST_PARTS))
    parts = triton.cdiv(count, rows * steps)
    dx = torch.empty_like(x)
    dweight = torch.empty((parts, channels), dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    with device_of(x):
        _gradient_kernel[(parts,)](
            x, weight, gradient, dx, dweight, dbias, count, channels, eps,
            ROWS=rows, WIDTH=width, STEPS=steps, num_warps=4,
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return _forward(x, weight, bias, residual, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradients = _backward(*ctx.saved_tensors, gradient, ctx.eps)
        return *gradients, gradient if ctx.has_residual else None, None


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    """`reference.rms_norm`, fused."""
    tensors = [x, weight, bias] + ([] if residual is None else [residual])
    known = x.shape[-1] <= WIDEST_ROW and (residual is None or residual.shape == x.shape)
    if not (known and runs_here(*tensors) and alike(*tensors)):
        return reference.rms_norm(x, weight, bias, residual, eps)
    launch = _RMSNorm.apply if tracked(*tensors) else _forward
    return launch(x, weight.contiguous(), bias.contiguous(), residual, eps)
