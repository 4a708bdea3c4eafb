"""x + gate * branch (`reference.gated_residual`) in rows of whole vectors, and its backward pass in one kernel.

For the gradient g of the result: dx = g, dbranch = gate g, dgate = sum over tokens of branch g.

Shapes: B batch, N tokens, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .launch import alike, device_of, rounded, runs_here, tracked, with_dense_rows

ROWS = 8  # tokens and
COLUMNS = 256  # channels that a program computes at once
WARPS = 4
MOST_PARTS = 64  # of the tokens of one row of the batch


@triton.jit
def _gated_residual_kernel(
    x_ptr, gate_ptr, branch_ptr, out_ptr,
    x_batch, x_row, gate_batch, branch_batch, branch_row,
    N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of COLUMNS channels; programs: (blocks of tokens, blocks of channels, B)."""
    tokens = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channels = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    mask = (tokens < N) & (channels < C)
    x = tl.load(x_ptr + batch * x_batch + tokens * x_row + channels, mask=mask).to(tl.float32)
    branch = tl.load(branch_ptr + batch * branch_batch + tokens * branch_row + channels, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + batch * gate_batch + channels, mask=channels < C).to(tl.float32)
    out = rounded(x + gate * branch, out_ptr.dtype.element_ty)
    tl.store(out_ptr + (batch * N + tokens) * C + channels, out, mask=mask)


@triton.jit
def _gradient_kernel(
    gate_ptr, branch_ptr, g_ptr, dgate_ptr, dbranch_ptr,
    gate_batch, branch_batch, branch_row, g_batch, g_row,
    N, C, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dbranch of STEPS * ROWS tokens, and their share of dgate; programs: (parts, blocks of channels, B)."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channels = columns[None, :]
    batch = tl.program_id(2).to(tl.int64)
    gate = tl.load(gate_ptr + batch * gate_batch + channels, mask=channels < C, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        tokens = ((part * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (tokens < N) & (channels < C)
        branch = tl.load(branch_ptr + batch * branch_batch + tokens * branch_row + channels, mask=mask, other=0.0)
        g = tl.load(g_ptr + batch * g_batch + tokens * g_row + channels, mask=mask, other=0.0).to(tl.float32)
        target = dbranch_ptr + (batch * N + tokens) * C + channels
        tl.store(target, rounded(gate * g, dbranch_ptr.dtype.element_ty), mask=mask)
        sums += branch.to(tl.float32) * g
    target = dgate_ptr + (part.to(tl.int64) * tl.num_programs(2) + batch) * C + columns
    tl.store(target, tl.sum(sums, 0), mask=columns < C)


def _forward(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    with device_of(x):
        _gated_residual_kernel[triton.cdiv(tokens, ROWS), triton.cdiv(channels, COLUMNS), batch](
            x, gate, branch, out,
            x.stride(0), x.stride(1), gate.stride(0), branch.stride(0), branch.stride(1),
            tokens, channels, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _backward(gate: Tensor, branch: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and branch."""
    batch, tokens, channels = branch.shape
    gradient = with_dense_rows(gradient)
    blocks = triton.cdiv(tokens, ROWS)
    steps = triton.next_power_of_2(triton.cdiv(blocks, MOST_PARTS))
    parts = triton.cdiv(blocks, steps)
    dbranch = torch.empty((batch, tokens, channels), dtype=branch.dtype, device=branch.device)
    dgate = torch.empty((parts, batch, 1, channels), dtype=torch.float32, device=branch.device)
    with device_of(branch):
        _gradient_kernel[parts, triton.cdiv(channels, COLUMNS), batch](
            gate, branch, gradient, dgate, dbranch,
            gate.stride(0), branch.stride(0), branch.stride(1), gradient.stride(0), gradient.stride(1),
            tokens, channels, STEPS=steps, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return dgate.sum(0).to(gate.dtype), dbranch


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, branch):
        ctx.save_for_backward(gate, branch)
        return _forward(x, gate, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, *_backward(*ctx.saved_tensors, gradient)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`reference.gated_residual`, fused."""
    known = x.ndim == 3 and x.shape == branch.shape and gate.shape == (len(x), 1, x.shape[-1])
    if not (known and runs_here(x, gate, branch) and alike(x, gate, branch)):
        return reference.gated_residual(x, gate, branch)
    x, gate, branch = (with_dense_rows(tensor) for tensor in (x, gate, branch))
    return _GatedResidual.apply(x, gate, branch) if tracked(x, gate, branch) else _forward(x, gate, branch)
