"""What a processor computes in fewer passes over memory than PyTorch's functions take one by one, in place of some.

That is for float32 without gradients. All else is left to the reference, which these match but for rounding.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import REFERENCE, QKNorm, reference


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


def _is_ours(*tensors: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors)):
        return False
    return all((one.device.type, one.dtype) == ("cpu", torch.float32) for one in tensors)


PROCESSOR = replace(REFERENCE, linear_attention=linear_attention, modulate=modulate)
