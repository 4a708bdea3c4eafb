"""DC-AE, the deep-compression autoencoder (arXiv:2410.10733): 32, 64 or 128 pixels a side become one latent position.

Attribute names are the keys of the published checkpoints (mit-han-lab/efficientvit, `dc_ae.py`).
Shapes: B batch, C channels, h and w the size of a feature map.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import DCAEConfig
from ..kernels import REFERENCE, Kernels
from ..kernels.reference import gated_linear_unit, linear_attention
from .convolution import ConvLayer, RMSNorm2d, SiLU, plus
from .resampling import (
    Downsample,
    InterpolateConv,
    PixelShuffleConv,
    PixelUnshuffleConv,
    Upsample,
    average_channels,
    duplicate_channels,
)

HEAD_DIM = 32
EXPAND_RATIO = 4  # of the feed-forward
AGGREGATION_KERNEL = 5  # of the multi-scale attention
ATTENTION_EPS = 1e-15


class ResBlock(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int, batch_norm: bool = False, **factory):
        super().__init__()
        norm = nn.BatchNorm2d(channels, **factory) if batch_norm else RMSNorm2d(channels, **factory)
        act = nn.ReLU(inplace=True) if batch_norm else SiLU()
        self.main = nn.Sequential()
        self.main.add_module("conv1", ConvLayer(channels, channels, act=act, **factory))
        self.main.add_module("conv2", ConvLayer(channels, channels, bias=False, norm=norm, **factory))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.main.conv1(x)
        inner = self.main.conv2.conv(inner)  # by itself, so that its input is free when the norm begins
        return self.main.conv2.normalize(inner, x)


class LiteMLA(nn.Module):
    """Multi-scale linear attention of EfficientViT (arXiv:2205.14756).

    The channels of `qkv` are interleaved by head: 32 of q, 32 of k, 32 of v, and again.
    """

    def __init__(self, channels: int, multiscale: bool, **factory):
        super().__init__()
        qkv_channels = 3 * channels
        self.qkv = ConvLayer(channels, qkv_channels, kernel_size=1, bias=False, **factory)
        self.aggreg = nn.ModuleList()
        if multiscale:
            groups = qkv_channels // HEAD_DIM
            k = AGGREGATION_KERNEL
            self.aggreg.append(
                nn.Sequential(
                    nn.Conv2d(
                        qkv_channels, qkv_channels, k, padding=k // 2, groups=qkv_channels, bias=False, **factory
                    ),
                    nn.Conv2d(qkv_channels, qkv_channels, 1, groups=groups, bias=False, **factory),
                )
            )
        scales = 1 + len(self.aggreg)
        norm = RMSNorm2d(channels, **factory)
        self.proj = ConvLayer(scales * channels, channels, kernel_size=1, bias=False, norm=norm, **factory)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        scales = [[part.flatten(1, 2) for part in scale] for scale in self.project_in(x)]
        return self.project_out([linear_attention(*scale, ATTENTION_EPS) for scale in scales], residual)

    def project_in(self, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """q, k and v for [B, C, h, w], scale by scale: [B, h, w, C / 32, 32] each."""
        qkv = self.qkv(x)
        yield qkv.movedim(1, -1).unflatten(-1, (-1, 3, HEAD_DIM)).unbind(-2)
        for depthwise, grouped in self.aggreg:
            yield _project_heads(depthwise(qkv), grouped.weight).unbind(-2)

    def project_out(self, scales: list[Tensor], residual: Tensor) -> Tensor:
        """Results of the attention [B, h * w, C / 32, 32] by scale, with the residual [B, C, h, w]."""
        heads = torch.cat(scales, dim=2).to(residual.dtype)
        maps = heads.flatten(2).unflatten(1, residual.shape[-2:]).movedim(-1, 1)
        return self.proj.normalize(self.proj.conv(maps), residual)


def _project_heads(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution 1x1 of x [B, C, h, w] in groups of 32 channels, as one product: [B, h, w, C / 96, 3, 32]."""
    grouped = x.movedim(1, -1).flatten(1, 2).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # [B, groups, h * w, 32]
    mapped = grouped @ weight.view(-1, HEAD_DIM, HEAD_DIM).transpose(1, 2)
    return mapped.unflatten(2, x.shape[-2:]).unflatten(1, (-1, 3)).permute(0, 3, 4, 1, 2, 5)


class GLUMBConv(nn.Module):
    """Gated feed-forward with a depthwise 3x3 convolution between its two 1x1 convolutions."""

    def __init__(self, channels: int, **factory):
        super().__init__()
        hidden = channels * EXPAND_RATIO
        norm = RMSNorm2d(channels, **factory)
        self.inverted_conv = ConvLayer(channels, 2 * hidden, kernel_size=1, act=SiLU(), **factory)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, groups=2 * hidden, **factory)
        self.point_conv = ConvLayer(hidden, channels, kernel_size=1, bias=False, norm=norm, **factory)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        inner = self.inverted_conv(x)
        inner = self.depth_conv(inner)
        inner = gated_linear_unit(inner)
        inner = self.point_conv.conv(inner)
        return self.point_conv.normalize(inner, residual)


class Residual(nn.Module):
    """A module beside the identity, which it adds itself."""

    def __init__(self, main: nn.Module):
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x, x)


class EfficientViTBlock(nn.Module):
    """Global linear attention, then a local gated feed-forward."""

    def __init__(self, channels: int, multiscale: bool, **factory):
        super().__init__()
        self.context_module = Residual(LiteMLA(channels, multiscale, **factory))
        self.local_module = Residual(GLUMBConv(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class OpSequential(nn.Module):
    """Modules in a row, under the checkpoint's name for the list."""

    def __init__(self, ops: list[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class EncoderOut(nn.Module):
    """Convolution to the latent channels, beside their channel means."""

    def __init__(self, in_channels: int, latent_channels: int, **factory):
        super().__init__()
        self.latent_channels = latent_channels
        self.main = OpSequential([ConvLayer(in_channels, latent_channels, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        return plus(self.main(x), average_channels(x, self.latent_channels))


class DecoderIn(nn.Module):
    """Convolution from the latent channels, beside the duplicated channels."""

    def __init__(self, latent_channels: int, out_channels: int, **factory):
        super().__init__()
        self.out_channels = out_channels
        self.main = ConvLayer(latent_channels, out_channels, **factory)

    def forward(self, z: Tensor) -> Tensor:
        return plus(self.main(z), duplicate_channels(z, self.out_channels))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to latent [B, latent_channels, H / compression, W / compression]."""

    def __init__(self, config: DCAEConfig, **factory):
        super().__init__()
        channels, depths = config.encoder_channels, config.encoder_depths
        if depths[0] > 0:
            self.project_in = ConvLayer(3, channels[0], **factory)
        elif config.downsample == "conv":
            self.project_in = ConvLayer(3, channels[1], stride=2, **factory)
        else:
            self.project_in = PixelUnshuffleConv(3, channels[1], **factory)
        self.stages = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            ops = [
                EfficientViTBlock(width, config.multiscale, **factory)
                if config.encoder_attention[stage]
                else ResBlock(width, **factory)
                for _ in range(depth)
            ]
            if depth > 0 and stage + 1 < len(channels):
                ops.append(Downsample(width, channels[stage + 1], config.downsample, **factory))
            self.stages.append(OpSequential(ops))
        self.project_out = EncoderOut(channels[-1], config.latent_channels, **factory)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.project_in(pixels)
        for stage in self.stages:
            for op in stage.op_list:  # one by one, so that the stage's input is free after the first
                x = op(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """Latent [B, latent_channels, h, w] to pixels [B, 3, h * compression, w * compression]."""

    def __init__(self, config: DCAEConfig, **factory):
        super().__init__()
        channels, depths = config.decoder_channels, config.decoder_depths
        self.project_in = DecoderIn(config.latent_channels, channels[-1], **factory)
        self.stages = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            ops: list[nn.Module] = []
            if depth > 0 and stage + 1 < len(channels):
                ops.append(Upsample(channels[stage + 1], width, config.upsample, **factory))
            for _ in range(depth):
                if config.decoder_attention[stage]:
                    ops.append(EfficientViTBlock(width, config.multiscale, **factory))
                else:
                    ops.append(ResBlock(width, config.decoder_batch_norm[stage], **factory))
            self.stages.append(OpSequential(ops))
        self.project_out = self._project_out(config, **factory)

    @staticmethod
    def _project_out(config: DCAEConfig, **factory) -> OpSequential:
        act = nn.ReLU(inplace=True) if config.decoder_out_act == "relu" else SiLU()
        if config.decoder_depths[0] > 0:
            width = config.decoder_channels[0]
            conv = ConvLayer(width, 3, **factory)
        else:
            width = config.decoder_channels[1]
            conv = (InterpolateConv if config.upsample == "interpolate" else PixelShuffleConv)(width, 3, **factory)
        return OpSequential([RMSNorm2d(width, **factory), act, conv])

    def forward(self, z: Tensor) -> Tensor:
        x = self.project_in(z)
        for stage in reversed(self.stages):
            for op in stage.op_list:  # one by one, so that the stage's input is free after the first
                x = op(x)
        return self.project_out(x)


class DCAE(nn.Module):
    """The autoencoder. Latents are as the encoder makes them; `config.scaling_factor` brings them to unit deviation."""

    def __init__(
        self,
        config: DCAEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: Kernels = REFERENCE,
    ):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, device=device, dtype=dtype)
        self.decoder = Decoder(config, device=device, dtype=dtype)
        for module in self.modules():
            if isinstance(module, RMSNorm2d):
                module.kernels = kernels

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, which pixels and latents must share."""
        return next(self.parameters()).dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels.

        Args:
            pixels: [B, 3, H, W] in [-1, 1]; H and W multiples of `config.spatial_compression`.

        Returns:
            Unscaled latent [B, latent_channels, H / compression, W / compression].

        Raises:
            ValueError: a side is not a multiple of the compression.
        """
        self.check_sides(pixels)
        return self.encoder(pixels.contiguous(memory_format=torch.channels_last)).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes an unscaled latent [B, latent_channels, h, w] to pixels [B, 3, h * compression, w * compression].

        The pixels are about in [-1, 1], unclamped.
        """
        return self.decoder(latent.contiguous(memory_format=torch.channels_last)).contiguous()

    def check_sides(self, pixels: Tensor) -> None:
        """Raise ValueError if a side of the pixels [B, 3, H, W] is not a multiple of the compression."""
        compression = self.config.spatial_compression
        if pixels.shape[-1] % compression or pixels.shape[-2] % compression:
            raise ValueError(
                f"The autoencoder takes sides that are multiples of {compression}, "
                f"got {pixels.shape[-1]} x {pixels.shape[-2]} pixels. Crop or resize the picture."
            )
