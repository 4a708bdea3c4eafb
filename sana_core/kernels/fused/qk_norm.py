"""RMS norm of q and k around fused linear attention: 1 / rms of their rows in front of it, their gradients behind it.

Linear attention multiplies what it loads by 1 / rms and weight itself, so that normed rows are never written. With
y = x^ w, x^ = x r, r = 1 / rms(x) and h = g w, for the gradient g of y:

    dx = r (h - x^ mean(h x^))    dw = sum over rows of g x^

g comes in float32, as a program of linear attention sees one head and the mean takes all of them.

Shapes: B batch, N tokens, R = B * N rows, C channels of all heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, rounded

WIDEST_ROW = 8192  # channels; rows stay in the registers of one program
BLOCK = 4096  # numbers that a program holds of one tensor
MOST_PARTS = 512  # of the rows, for each of which a weight has a gradient of its own at first


@triton.jit
def _store_inverses(x_ptr, inverse_ptr, x_batch, x_row, R, N, C, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, WIDTH)
    places = ((rows // N) * x_batch + (rows % N) * x_row)[:, None] + channels[None, :]
    x = tl.load(x_ptr + places, mask=(rows < R)[:, None] & (channels < C)[None, :], other=0.0).to(tl.float32)
    tl.store(inverse_ptr + rows, 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps), mask=rows < R)


@triton.jit
def _inverse_kernel(
    q_ptr, k_ptr, q_inverse_ptr, k_inverse_ptr,
    q_batch, q_row, k_batch, k_row,
    q_rows, k_rows, q_tokens, k_tokens, C, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """1 / rms of ROWS rows of q or k; programs: (blocks of rows, 2)."""
    if tl.program_id(1) == 0:
        _store_inverses(q_ptr, q_inverse_ptr, q_batch, q_row, q_rows, q_tokens, C, eps, ROWS, WIDTH)
    else:
        _store_inverses(k_ptr, k_inverse_ptr, k_batch, k_row, k_rows, k_tokens, C, eps, ROWS, WIDTH)


@triton.jit
def _norm_gradient_kernel(
    x_ptr, inverse_ptr, weight_ptr, gradients_ptr, dx_ptr, dweight_ptr,
    x_batch, x_row, R, N, C,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx of STEPS blocks of ROWS rows, and their share of dweight; programs: parts."""
    part = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    for step in range(STEPS):
        rows = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows < R)[:, None] & (channels < C)[None, :]
        places = ((rows // N) * x_batch + (rows % N) * x_row)[:, None] + channels[None, :]
        dense = rows[:, None] * C + channels[None, :]
        inverse = tl.load(inverse_ptr + rows, mask=rows < R, other=0.0)[:, None]
        normed = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32) * inverse
        g = tl.load(gradients_ptr + dense, mask=mask, other=0.0)
        h = g * weight[None, :]
        dx = inverse * (h - normed * (tl.sum(h * normed, 1) / C)[:, None])
        tl.store(dx_ptr + dense, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(g * normed, 0)
    tl.store(dweight_ptr + part * C + channels, dweight, mask=channels < C)


def _block(channels: int) -> tuple[int, int]:
    """Rows and channels that a program holds, powers of two."""
    width = triton.next_power_of_2(channels)
    return max(1, BLOCK // width), width


def inverse_rms(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt(mean square + eps) of each row of q and k: [B, N] each, float32.

    Args:
        q, k: [B, N, H, D], whose rows of C = H * D channels are dense.
    """
    channels = q.shape[2] * q.shape[3]
    inverses = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k)]
    count = [inverse.numel() for inverse in inverses]
    rows, width = _block(channels)
    with device_of(q):
        _inverse_kernel[triton.cdiv(max(count), rows), 2](
            q, k, *inverses, *q.stride()[:2], *k.stride()[:2], *count, q.shape[1], k.shape[1], channels, eps,
            ROWS=rows, WIDTH=width, num_warps=4,
        )  # fmt: skip
    return inverses[0], inverses[1]


def norm_gradients(x: Tensor, inverse: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight.

    Args:
        x: q or k as given to `inverse_rms`.
        inverse: what that returned for it.
        weight: [C].
        gradient: of the normed x, [B, N, H, D] contiguous, float32.
    """
    count, channels = inverse.numel(), weight.numel()
    rows, width = _block(channels)
    steps = triton.next_power_of_2(triton.cdiv(count, rows * MOST_PARTS))
    parts = triton.cdiv(count, rows * steps)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty((parts, channels), dtype=torch.float32, device=x.device)
    with device_of(x):
        _norm_gradient_kernel[(parts,)](
            x, inverse, weight, gradient, dx, dweight, *x.stride()[:2], count, x.shape[1], channels,
            ROWS=rows, WIDTH=width, STEPS=steps, num_warps=4,
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)
