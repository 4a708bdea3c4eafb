"""How DC-AE halves and doubles the size of its maps: convolutions beside parameter-free shortcuts.

Shapes: B batch, C channels, h and w the size of the input.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import ConvLayer, plus


class PixelUnshuffleConv(nn.Module):
    """Halves the size: convolution to a quarter of the channels, then space to depth."""

    def __init__(self, in_channels: int, out_channels: int, **factory):
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels // 4, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class PixelShuffleConv(nn.Module):
    """Doubles the size: convolution to four times the channels, then depth to space."""

    def __init__(self, in_channels: int, out_channels: int, **factory):
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels * 4, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv(x))


class InterpolateConv(nn.Module):
    """Doubles the size: nearest neighbour, then a convolution.

    Among the 3x3 positions that an output position sees, all that come from one input position are equal. So each of
    the four output positions that belong to an input position is a 2x2 convolution of the input, whose weights are sums
    of the 3x3 (sub-pixel form, arXiv:1609.05158): 16 products instead of 36, and the enlarged input is never made.
    """

    def __init__(self, in_channels: int, out_channels: int, **factory):
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        conv = self.conv.conv
        out = _empty_double(x, conv.out_channels)
        for row, column, weight in sub_pixel_weights(conv.weight):
            part = F.conv2d(x, weight, conv.bias, padding=1)  # one position more a side than is needed
            out[..., row::2, column::2] = part[..., row : row + height, column : column + width]
        return out


def sub_pixel_weights(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """2x2 weights, by row and column of the output among each 2x2, of a 3x3 convolution after a nearest-neighbour x2.

    They are sums in float32 at least, so that shorter dtypes are rounded once.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for row, rows in enumerate(_sub_pixel(wide, 2)):
        for column, both in enumerate(_sub_pixel(rows, 3)):
            yield row, column, both.to(weight.dtype)


def _sub_pixel(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights of the even and the odd output positions along a dimension."""
    before, here, after = weight.unbind(dim)
    return torch.stack([before, here + after], dim), torch.stack([before + here, after], dim)


def _empty_double(x: Tensor, channels: int) -> Tensor:
    """A map of twice the size."""
    size = (x.shape[0], channels, 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def depth_to_space(x: Tensor) -> Tensor:
    """`pixel_shuffle` by two, which leaves the channels-last layout on a GPU, within it: [B, C / 4, 2h, 2w]."""
    out = _empty_double(x, x.shape[1] // 4)
    for row in range(2):
        for column in range(2):
            out[..., row::2, column::2] = x[:, 2 * row + column :: 4]
    return out


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Means of neighbouring channels, so that `channels` remain: the parameter-free way down."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def duplicate_channels(x: Tensor, channels: int) -> Tensor:
    """Repeats each channel in place, so that there are `channels`: the parameter-free way up."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def average_space_to_depth(x: Tensor, channels: int) -> Tensor:
    """`average_channels` of `pixel_unshuffle(x, 2)`, without the latter where means are over whole rows or squares."""
    averaged = 4 * x.shape[1] // channels
    if averaged == 4:
        return F.avg_pool2d(x, 2)
    if averaged == 2:
        return F.avg_pool2d(x, (1, 2)).unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)
    return average_channels(F.pixel_unshuffle(x, 2), channels)


def add_duplicated_in_space(fresh: Tensor, x: Tensor) -> Tensor:
    """Adds `pixel_shuffle(duplicate_channels(x, 4 * C'), 2)` to a map [B, C', 2h, 2w] that nobody else holds.

    Each of the four output positions that belong to an input position reads every n-th channel of the input.
    """
    if x.shape[1] < fresh.shape[1]:
        x = duplicate_channels(x, fresh.shape[1])
    step = x.shape[1] // fresh.shape[1]
    for row in range(2):
        for column in range(2):
            fresh[..., row::2, column::2].add_(x[:, (2 * row + column) * step // 4 :: step])
    return fresh


class Downsample(nn.Module):
    """Halves the size, beside space-to-depth averaged to the output's channels."""

    def __init__(self, in_channels: int, out_channels: int, kind: str, **factory):
        super().__init__()
        self.out_channels = out_channels
        if kind == "conv":
            self.main = ConvLayer(in_channels, out_channels, stride=2, **factory)
        else:
            self.main = PixelUnshuffleConv(in_channels, out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return plus(self.main(x), average_space_to_depth(x, self.out_channels))


class Upsample(nn.Module):
    """Doubles the size, beside depth-to-space of duplicated channels."""

    def __init__(self, in_channels: int, out_channels: int, kind: str, **factory):
        super().__init__()
        self.out_channels = out_channels
        self.main = (InterpolateConv if kind == "interpolate" else PixelShuffleConv)(
            in_channels, out_channels, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        return add_duplicated_in_space(self.main(x), x)
