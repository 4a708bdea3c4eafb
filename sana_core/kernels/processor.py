"""What a processor computes in fewer passes over memory than PyTorch's functions take one by one, in place of some.

That is for float32 without gradients. All else is left to the reference, which these match but for rounding.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import REFERENCE, QKNorm, reference

IN_CACHE = 1 << 18  # numbers that the cores' own caches hold twice
SAME = [1, 1], [1, 1], [1, 1]  # padding, stride and dilation of a 3x3 convolution that keeps the size


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm | None = None) -> Tensor:
    """As `reference.linear_attention`, but q and k are overwritten."""
    if not _is_ours(q, k, v):
        return reference.linear_attention(q, k, v, eps, norms)
    if norms is not None:
        q, k = reference.qk_norm(q, k, norms)
    q, k, values = (part.transpose(1, 2) for part in (q.relu_(), k.relu_(), v))
    # The normaliser is one more column of the result, and the division puts heads back behind tokens.
    state = torch.cat([k.transpose(-1, -2) @ values, k.sum(dim=2).unsqueeze(-1)], dim=-1)
    weighted, normaliser = (q @ state).split([v.shape[-1], 1], dim=-1)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    torch.div(weighted, normaliser + eps, out=out.transpose(1, 2))
    return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As `reference.modulate`: one row alone is scaled and shifted while it is normed."""
    if len(x) > 1 or shift.shape[1] > 1 or not _is_ours(x, shift, scale):
        return reference.modulate(x, shift, scale)
    return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), 1e-6)


def gated_residual_(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """`reference.gated_residual` without gradients, in the memory of the branch."""
    return torch.addcmul(x, gate, branch, out=branch)


def silu_of_double_(half: Tensor) -> Tensor:
    """SiLU of 2 * half, in place: half [..., C], contiguous, without gradients.

    silu(2h) = h + h tanh(h), whose tanh is that of MKL. The exponential of PyTorch's SiLU takes up to three times as
    long, in some processes and not in others.
    """
    rows = half.view(-1, half.shape[-1])
    count = max(1, IN_CACHE // half.shape[-1])
    tanh = torch.empty_like(rows[:count])
    for part in rows.split(count):
        torch.addcmul(part, part, torch.tanh(part, out=tanh[: len(part)]), out=part)
    return half


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a depthwise 3x3 convolution of channels-last x [B, C, h, w], written once, without gradients.

    weight: [C, 1, 3, 3]; bias: [C].
    """
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *SAME, len(bias), "swish", [], "")


def depthwise_product(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """A depthwise 3x3 convolution of channels-last x [B, C, h, w] times a factor like it, as in `depthwise_silu`."""
    convolve = torch.ops.mkldnn._convolution_pointwise.binary
    return convolve(x, factor, weight, bias, *SAME, len(bias), "mul", None, None, [], None)


def _is_ours(*tensors: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors)):
        return False
    return all((one.device.type, one.dtype) == ("cpu", torch.float32) for one in tensors)


PROCESSOR = replace(REFERENCE, linear_attention=linear_attention, modulate=modulate)
