"""The layers of the Sana transformer. Attribute names are the keys of the published checkpoints.

Shapes: B batch, N tokens = h * w latent positions, L caption tokens, C hidden size, H heads.
Source: NVlabs/Sana `diffusion/model/nets/sana_blocks.py`, `basic_modules.py`, `norms.py`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SanaConfig
from ..kernels import Kernels, QKNorm
from ..kernels.reference import AT_ONCE

FLOAT16_MAX = 65504.0


def on_weights(conv: nn.Module, compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> nn.Module:
    """The convolution, computed by `compute(x, weight, bias)`.

    That is where torch and comfy.ops do the arithmetic, after they have cast, moved and patched the weights.
    """
    conv._conv_forward = compute
    return conv


def is_untouched(layer: nn.Module) -> bool:
    """Whether a call of the layer is its class's forward pass and nothing else."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return "forward" not in layer.__dict__ and not any(hooks)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution with weight [O, I, 1, 1] of tokens [B, N, I]: one GEMM, and contiguous tokens again."""
    return F.linear(x, weight.flatten(1), bias)


class PatchEmbed(nn.Module):
    """Latent [B, in_channels, h, w] to tokens [B, h * w, C]."""

    def __init__(self, config: SanaConfig, operations, **factory):
        super().__init__()
        self.proj = on_weights(operations.Conv2d(config.in_channels, config.hidden_size, 1, **factory), pointwise)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.flatten(2).transpose(1, 2))


def position_embedding(config: SanaConfig, height: int, width: int, device: torch.device) -> Tensor:
    """Two-dimensional sine-cosine embedding [height * width, C] of the 2K and 4K models, float32.

    Coordinates span base / interpolation whatever the size is, so the embedding depends on (height, width) and not
    on the count of tokens. The first half of the channels encodes the column, the second half the row, each as
    sines and then cosines (NVlabs/Sana `sana.py`, `get_2d_sincos_pos_embed`).
    """
    quarter = config.hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float64) / quarter)

    def encode(length: int) -> Tensor:
        index = torch.arange(length, device=device, dtype=torch.float64)
        angle = torch.outer(index * config.pos_embed_base / length / config.pos_embed_interpolation, omega)
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    columns = encode(width)[None].expand(height, -1, -1)
    rows = encode(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class TimestepEmbedder(nn.Module):
    """A scalar [B] to [B, C], through 256 cosines and sines in float32."""

    NUM_FREQUENCIES = 128
    MAX_PERIOD = 10000

    def __init__(self, config: SanaConfig, operations, **factory):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(2 * self.NUM_FREQUENCIES, config.hidden_size, **factory),
            nn.SiLU(),
            operations.Linear(config.hidden_size, config.hidden_size, **factory),
        )

    def forward(self, scalar: Tensor, dtype: torch.dtype) -> Tensor:
        index = torch.arange(self.NUM_FREQUENCIES, device=scalar.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(self.MAX_PERIOD) / self.NUM_FREQUENCIES * index)
        angle = scalar.float()[:, None] * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    def __init__(self, in_features: int, out_features: int, operations, **factory):
        super().__init__()
        self.fc1 = operations.Linear(in_features, out_features, **factory)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = operations.Linear(out_features, out_features, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CaptionEmbedder(nn.Module):
    """Text features [B, L, caption_channels] to [B, L, C]."""

    def __init__(self, config: SanaConfig, operations, **factory):
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, operations, **factory)

    def forward(self, context: Tensor) -> Tensor:
        return self.y_proj(context)


class LinearAttention(nn.Module):
    """ReLU linear self-attention; q and k are normalised over all C, before the split into heads."""

    EPS = 1e-8  # of the normaliser
    NORM_EPS = 1e-5

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, **factory):
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.clamps = config.clamps_attention
        self.kernels = kernels
        self.qkv = operations.Linear(size, 3 * size, bias=False, **factory)
        self.q_norm = operations.RMSNorm(size, eps=self.NORM_EPS, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = operations.RMSNorm(size, eps=self.NORM_EPS, **factory) if config.qk_norm else nn.Identity()
        self.proj = operations.Linear(size, size, **factory)

    def forward(self, x: Tensor, perturbed_rows: int = 0) -> Tensor:
        """Attention of x [B, N, C]; in the last `perturbed_rows` rows each position attends to itself alone."""
        rows = len(x) - perturbed_rows
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = q[:rows], k[:rows]
        norms = self._norms(q)
        if norms is None:
            q, k = self.q_norm(q), self.k_norm(k)
        heads = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v[:rows]))
        out = self.kernels.linear_attention(*heads, self.EPS, norms).flatten(2)
        if perturbed_rows:
            out = torch.cat([out, v[rows:]])
        out = self.proj(out)
        return F.hardtanh(out, -FLOAT16_MAX, FLOAT16_MAX, inplace=not out.requires_grad) if self.clamps else out

    def _norms(self, q: Tensor) -> QKNorm | None:
        """The norms for the kernel to compute; None where there are none, or they have to be called."""
        norms = (self.q_norm, self.k_norm)
        if torch.is_autocast_enabled(q.device.type) or not all(map(self.is_plain, norms)):
            return None
        fits = all(
            (one.eps, one.weight.dtype, one.weight.device) == (self.NORM_EPS, q.dtype, q.device) for one in norms
        )
        return QKNorm(self.q_norm.weight, self.k_norm.weight, self.NORM_EPS) if fits else None

    @staticmethod
    def is_plain(norm: nn.Module, forward: Callable = nn.RMSNorm.forward) -> bool:
        """Whether a call of the norm is the class's `forward` with the weight that it holds, and nothing else.

        Whoever brings norms that compute like torch's only at times replaces this by what knows when.
        """
        return type(norm).forward is forward and norm.elementwise_affine and is_untouched(norm)


def each(tensors: NamedTuple, change: Callable[[Tensor], Tensor]) -> NamedTuple:
    """A named tuple of tensors, with every one changed in the same way."""
    return type(tensors)(*map(change, tensors))


class KeysValues(NamedTuple):
    """What cross-attention reads of captions: [B, L, H, D] each."""

    keys: Tensor
    values: Tensor


class AbsorbedKeysValues(NamedTuple):
    """Keys and values that have absorbed the projections of queries and results, in front of and behind them.

    Both products are linear, so their order is free: q k^T = x (W_q k^T), and (p v) W_o = p (v W_o). All heads of a
    caption's first token come first, so that the end of a row is padding.
    """

    keys: Tensor  # [B, C, L * H], scaled
    bias: Tensor  # [B, L * H], of the scores
    values: Tensor  # [B, L * H, C]
    lengths: Tensor  # [B], how many of the L tokens count


class CrossAttention(nn.Module):
    """Softmax attention of the tokens over the caption, whose keys and values do not depend on the step."""

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, **factory):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_cross_heads
        self.kernels = kernels
        self.q_linear = operations.Linear(size, size, **factory)
        self.kv_linear = operations.Linear(size, 2 * size, **factory)
        self.q_norm = operations.RMSNorm(size, eps=1e-6, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = operations.RMSNorm(size, eps=1e-6, **factory) if config.qk_norm else nn.Identity()
        self.proj = operations.Linear(size, size, **factory)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of captions [B, L, C]."""
        k, v = self.kv_linear(context).chunk(2, dim=-1)
        return KeysValues(*(part.unflatten(-1, (self.num_heads, -1)) for part in (self.k_norm(k), v)))

    def prepare(self, context: Tensor, mask: Tensor | None, absorb: bool) -> KeysValues | AbsorbedKeysValues:
        """What the forward pass reads of captions [B, L, C] with mask [B, L] bool; absorbed if asked, where it pays."""
        keys_values = self.keys_values(context)
        return self._absorbed(keys_values, mask) if absorb and self._absorbs(keys_values.keys) else keys_values

    def _absorbs(self, keys: Tensor) -> bool:
        """Whether absorbed keys and values give the same with less work, and at most twice the projections' memory.

        Queries with a norm are not linear. In 16 bits the scores would be rounded in front of the softmax. On a GPU the
        gain has not been measured.
        """
        plain = (isinstance(layer, nn.Linear) and is_untouched(layer) for layer in (self.q_linear, self.proj))
        linear = isinstance(self.q_norm, nn.Identity) and all(plain)
        exact = keys.dtype == torch.float32 and not torch.is_autocast_enabled(keys.device.type)
        batch, length, heads, width = keys.shape
        return linear and exact and keys.device.type == "cpu" and length < width and batch * length <= 2 * width

    def _absorbed(self, keys_values: KeysValues, mask: Tensor | None) -> AbsorbedKeysValues:
        k, v = (part.transpose(1, 2) for part in keys_values)  # [B, H, L, D]
        k = k * k.shape[-1] ** -0.5
        w_q = self.q_linear.weight.unflatten(0, (self.num_heads, -1))  # [H, D, C]
        w_o = self.proj.weight.t().unflatten(0, (self.num_heads, -1))  # [H, D, C]
        bias = k @ self.q_linear.bias.view(self.num_heads, -1, 1)  # [B, H, L, 1]
        # A head's probabilities add up to 1, so that each of the heads may bring its share of the bias.
        values = v @ w_o + self.proj.bias / self.num_heads
        keys, bias, values = (part.transpose(1, 2).flatten(1, 2) for part in (k @ w_q, bias, values))
        lengths = torch.full((len(k),), k.shape[2]) if mask is None else mask.sum(dim=1)
        return AbsorbedKeysValues(keys.mT, bias.squeeze(-1), values, lengths)

    def forward(self, x: Tensor, caption: KeysValues | AbsorbedKeysValues, mask: Tensor | None) -> Tensor:
        """x [B, N, C] plus its attention; mask: [B, L] bool, or None. Absorbed captions are added to x in place."""
        if isinstance(caption, AbsorbedKeysValues):
            return self._attend_(x, caption)
        q = self.q_norm(self.q_linear(x)).unflatten(-1, (self.num_heads, -1))
        return x + self.proj(self.kernels.attention(q, *caption, mask).flatten(2))

    def _attend_(self, x: Tensor, caption: AbsorbedKeysValues) -> Tensor:
        for row, length in enumerate(caption.lengths.tolist()):
            end = length * self.num_heads
            scores = torch.mm(x[row], caption.keys[row, :, :end]).add_(caption.bias[row, :end])
            probabilities = scores.unflatten(-1, (length, self.num_heads)).softmax(dim=-2).flatten(-2)
            x[row].addmm_(probabilities, caption.values[row, :end])
        return x


class ConvLayer(nn.Module):
    """A convolution, under the checkpoint's name for it."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GLUMBConv(nn.Module):
    """Mix-FFN: a gated feed-forward with a depthwise 3x3 convolution over the latent positions."""

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, **factory):
        super().__init__()
        size = config.hidden_size
        hidden = int(size * config.mlp_ratio)
        self.channels = 2 * hidden
        inverted = operations.Conv2d(size, 2 * hidden, 1, **factory)
        depthwise = operations.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory)
        point = operations.Conv2d(hidden, size, 1, bias=False, **factory)
        self.inverted_conv = ConvLayer(on_weights(inverted, pointwise))
        self.depth_conv = ConvLayer(on_weights(depthwise, kernels.gated_depthwise))
        self.point_conv = ConvLayer(on_weights(point, pointwise))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """The feed-forward of x [B, N, C], N = height * width."""
        # Large memory, in each block anew, costs a processor time page by page, and a large batch gains it nothing.
        apart = x.device.type == "cpu" and len(x) > 1 and len(x) * height * width * self.channels > AT_ONCE
        if apart and not torch.is_grad_enabled():
            return torch.cat([self._mix(row, height, width) for row in x.split(1)])
        return self._mix(x, height, width)

    def _mix(self, x: Tensor, height: int, width: int) -> Tensor:
        # Tokens seen as a channels-last picture, and back: views. Split before they are permuted, they keep strides
        # that convolutions know as channels-last when there is one picture.
        x = self.depth_conv(self.inverted_conv(x).unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return self.point_conv(x.permute(0, 2, 3, 1).flatten(1, 2))


class SanaBlock(nn.Module):
    """Linear self-attention, cross-attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, **factory):
        super().__init__()
        size = config.hidden_size
        self.kernels = kernels
        self.attn = LinearAttention(config, operations, kernels, **factory)
        self.cross_attn = CrossAttention(config, operations, kernels, **factory)
        self.mlp = GLUMBConv(config, operations, kernels, **factory)
        self.scale_shift_table = nn.Parameter(torch.randn(6, size, **factory) / size**0.5)

    def forward(
        self,
        x: Tensor,
        caption: KeysValues | AbsorbedKeysValues,
        mask: Tensor | None,
        t0: Tensor,
        height: int,
        width: int,
        perturbed_rows: int = 0,
    ) -> Tensor:
        """Runs the block.

        Args:
            x: [B, N, C].
            caption: of this block's cross-attention.
            mask: [B, L] bool, or None.
            t0: [B, 6C], from the timestep.
            height, width: of the latent; N = height * width.
            perturbed_rows: how many of the last rows of x get the identity for self-attention.
        """
        modulation = self.scale_shift_table.to(t0) + t0.unflatten(1, (6, -1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        modulate, gated_residual = self.kernels.modulate, self.kernels.gated_residual
        x = gated_residual(x, gate_msa, self.attn(modulate(x, shift_msa, scale_msa), perturbed_rows))
        x = self.cross_attn(x, caption, mask)
        return gated_residual(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp), height, width))


class FinalLayer(nn.Module):
    """Tokens [B, N, C] to the velocity of each latent position [B, N, in_channels], modulated by the timestep."""

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, **factory):
        super().__init__()
        size = config.hidden_size
        self.kernels = kernels
        self.linear = operations.Linear(size, config.in_channels, **factory)
        self.scale_shift_table = nn.Parameter(torch.randn(2, size, **factory) / size**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table.to(t) + t[:, None]).chunk(2, dim=1)
        return self.linear(self.kernels.modulate(x, shift, scale))
