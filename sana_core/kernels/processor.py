"""What a processor computes in fewer passes over memory than PyTorch's functions take one by one, in place of some.

That is for float32 without gradients. All else is left to the reference, which these match but for rounding. Where the
machine has a C compiler, it compiles processor.c; without one, the reference does nearly all.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from . import REFERENCE, QKNorm, reference
from .compiler import compiled

HEAD_WIDTH, LANES = 32, 16  # processor.c knows heads of this width, and multiples of so many channels
IN_PLACE = 1 << 23  # numbers of a feed-forward; of more, results go where their values were. New memory takes time
BLOCK = 512  # channels at a time: three lines of a picture stay in a core's cache


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm | None = None) -> Tensor:
    """As `reference.linear_attention`."""
    if not _is_ours(q, k, v):
        return reference.linear_attention(q, k, v, eps, norms)
    if norms is not None:
        q, k = reference.qk_norm(q, k, norms)
    known = q.shape == k.shape == v.shape and all(map(_has_known_heads, (q, k, v)))
    if not known or _library() is None:
        return reference.linear_attention(q, k, v, eps)
    out = torch.empty(v.shape, dtype=v.dtype)
    given = (number for part in (q, k, v) for number in (part.data_ptr(), part.stride(0), part.stride(1)))
    _library().linear_attention(out.data_ptr(), *given, *v.shape[:3], eps, torch.get_num_threads())
    return out


def _has_known_heads(part: Tensor) -> bool:
    return part.shape[3] == HEAD_WIDTH and part.stride()[2:] == (HEAD_WIDTH, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As `reference.modulate`."""
    batch, _, channels = x.shape
    known = channels % LANES == 0 and x.is_contiguous() and shift.shape == scale.shape == (batch, 1, channels)
    known = known and shift.stride() == scale.stride() and shift.stride(2) == 1
    if not known or not _is_ours(x, shift, scale) or _library() is None:
        return reference.modulate(x, shift, scale)
    out = torch.empty_like(x)
    given = (one.data_ptr() for one in (out, x, shift, scale))
    _library().modulate(*given, shift.stride(0), *x.shape, reference.MODULATE_EPS, torch.get_num_threads())
    return out


def gated_residual_(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`reference.gated_residual` without gradients, in the memory of the branch."""
    return torch.addcmul(x, gate, branch, out=branch)


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """As `reference.gated_depthwise`; with x_bias [2C], which is added to x first, without gradients only."""
    hidden, threads = len(weight) // 2, torch.get_num_threads()
    positions = x.permute(0, 2, 3, 1)
    known = hidden % LANES == 0 and all(one.is_contiguous() for one in (positions, weight, bias))
    known = known and weight.shape[1:] == (1, 3, 3) and x.shape[1] == len(weight) == len(bias)
    if not known or not _is_ours(x, weight, bias) or _library() is None:
        return reference.gated_depthwise(x if x_bias is None else x.add_(x_bias.view(-1, 1, 1)), weight, bias)
    batch, height, width, _ = positions.shape
    out = positions if x.numel() > IN_PLACE else x.new_empty(batch, height, width, hidden)
    block = _block(hidden, threads)
    scratch = x.new_empty(threads, block, _library().scratch_per_channel(width))
    pointers = [None if one is None else one.data_ptr() for one in (x, x_bias, weight, bias)]
    sizes = batch, height, width, hidden, block
    _library().gated_depthwise(out.data_ptr(), out.stride(2), *pointers, *sizes, scratch.data_ptr(), threads)
    return out[..., :hidden].permute(0, 3, 1, 2)


def _block(channels: int, threads: int) -> int:
    """How many channels to do at a time: at most `BLOCK`, and about as many for one thread as for another."""
    blocks = threads * math.ceil(channels / (BLOCK * threads))
    return LANES * math.ceil(channels / LANES / blocks)


def _is_ours(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    # What others derive from Tensor may have no memory of its own.
    plain = all(type(one) in (Tensor, nn.Parameter) for one in tensors)
    return plain and all((one.device.type, one.dtype) == ("cpu", torch.float32) for one in tensors)


@cache
def _library() -> ctypes.CDLL | None:
    """The functions of processor.c, with their arguments' types; None where there is no compiler."""
    library = compiled(Path(__file__).with_suffix(".c"))
    if library is None:
        return None
    part = [c_void_p, c_long, c_long]
    library.linear_attention.argtypes = [c_void_p, *3 * part, *3 * [c_long], c_float, c_int]
    library.modulate.argtypes = [*4 * [c_void_p], *4 * [c_long], c_float, c_int]
    library.gated_depthwise.argtypes = [c_void_p, c_long, *4 * [c_void_p], *5 * [c_long], c_void_p, c_int]
    library.scratch_per_channel.argtypes, library.scratch_per_channel.restype = [c_long], c_long
    library.linear_attention.restype = library.modulate.restype = library.gated_depthwise.restype = None
    return library


PROCESSOR = replace(REFERENCE, linear_attention=linear_attention, modulate=modulate, gated_depthwise=gated_depthwise)
