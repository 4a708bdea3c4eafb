"""The specification of every kernel, in plain PyTorch. A fused kernel must match it in outputs and gradients.

Shapes: B batch, N tokens, L caption tokens, H heads, D head width, C = H * D channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 1 << 22  # numbers of which the feed-forward makes a new tensor; where there are more, it goes part by part
MODULATE_EPS = 1e-6  # added to the variance


class QKNorm(NamedTuple):
    """Root-mean-square norms of q and k over all C channels, before the split into heads: SANA-1.5 and Sprint."""

    q_weight: Tensor  # [C]
    k_weight: Tensor  # [C]
    eps: float  # added to the mean square


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm | None = None) -> Tensor:
    """ReLU linear attention, without mask or scale (Sana, arXiv:2410.10629, section 2.2).

    K^T V and the sum of K are the whole state, so the cost is linear in N. The state overflows float16 and loses
    the small terms in bfloat16: it is float32, also under autocast.

    Args:
        q, k, v: [B, N, H, D], before the ReLU.
        eps: added to the normaliser.
        norms: of q and k, if they are to be normed first.

    Returns:
        [B, N, H, D] in v's dtype.
    """
    if norms is not None:
        q, k = qk_norm(q, k, norms)
    state, total = linear_attention_state(k, v)
    return linear_attention_output(q, state, total, eps).to(v.dtype)


def qk_norm(q: Tensor, k: Tensor, norms: QKNorm) -> tuple[Tensor, Tensor]:
    """q and k [B, N, H, D], normed."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.flatten(2), weight.shape, weight, norms.eps).unflatten(2, x.shape[2:])

    return normed(q, norms.q_weight), normed(k, norms.k_weight)


def linear_attention_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All that linear attention keeps of its keys and values; the states of parts of the tokens add up to the whole's.

    Args:
        k, v: [B, N, H, D], before the ReLU.

    Returns:
        K^T V [B, H, D, D] and the sum of K [B, H, D], float32.
    """
    with torch.autocast(k.device.type, enabled=False):
        k, v = (part.float().transpose(1, 2) for part in (k.relu(), v))
        return k.transpose(-1, -2) @ v, k.sum(dim=2)


def linear_attention_output(q: Tensor, state: Tensor, total: Tensor, eps: float) -> Tensor:
    """What queries [B, N, H, D], before the ReLU, read from a state: [B, N, H, D], float32."""
    with torch.autocast(q.device.type, enabled=False):
        q = q.relu().float().transpose(1, 2)
        normaliser = q @ total.unsqueeze(-1)  # [B, H, N, 1]
        return ((q @ state) / (normaliser + eps)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention with scale 1 / sqrt(D).

    Args:
        q: [B, N, H, D].
        k, v: [B, L, H, D].
        mask: [B, L] bool, True = attend; None attends to all.

    Returns:
        [B, N, H, D].
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    attn_mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift: the adaptive norm of DiT (arXiv:2212.09748).

    Args:
        x: [B, N, C].
        shift, scale: [B, 1, C].
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=MODULATE_EPS), 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, for x and branch [B, N, C] and gate [B, 1, C]."""
    return torch.addcmul(x, gate, branch)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the channels, with weight and bias [C], plus a residual: DC-AE's norm.

    Args:
        x, residual: [..., C].
        eps: added to the mean square.
    """
    out = F.rms_norm(x, weight.shape, weight, eps)
    for term in (bias, residual):
        if term is not None:
            out = out + term if out.requires_grad else out.add_(term)
    return out


def gated_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU, a depthwise 3x3 convolution with zeros around the picture, and the gated linear unit of the result.

    Args:
        x: [B, 2C, h, w], best in channels-last layout. Without gradients or autocast it is overwritten.
        weight: [2C, 1, 3, 3].
        bias: [2C].

    Returns:
        [B, C, h, w], in x's layout, but perhaps a half of the channels of something larger.
    """
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    if tracked or torch.is_autocast_enabled(x.device.type):
        return gated_linear_unit(depthwise(F.silu(x), weight, bias))
    x = F.silu(x, inplace=True)
    if x.numel() <= AT_ONCE:
        return gated_linear_unit(depthwise(x, weight, bias))
    # Much new memory, in each block anew, costs a processor as much time as the convolution, since the operating system
    # hands it out page by page: so a few channels at a time, whose results go where their values were.
    channels = len(weight) // 2
    step = max(1, channels * AT_ONCE // x.numel())
    for start in range(0, channels, step):
        value = slice(start, min(start + step, channels))
        gate = slice(channels + value.start, channels + value.stop)
        gated = F.silu(depthwise(x[:, gate], weight[gate], bias[gate]), inplace=True)
        torch.mul(depthwise(x[:, value], weight[value], bias[value]), gated, out=x[:, value])
    return x[:, :channels]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of each channel of x [B, C, h, w] by itself, with weight [C, 1, 3, 3] and bias [C]."""
    return F.conv2d(x, weight, bias, padding=1, groups=len(weight))


def gated_linear_unit(x: Tensor) -> Tensor:
    """value * silu(gate) of x [B, 2C, h, w], whose first half of channels is the value and second half the gate."""
    value, gate = x.chunk(2, dim=1)
    if x.requires_grad:
        return value * F.silu(gate)
    return F.silu(gate).mul_(value)
