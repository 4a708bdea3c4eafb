"""Memory that the autoencoder needs for a picture of a given size, whole or in tiles, before it runs.

The figures below count the tensors that are alive at the worst moment of each operation, as PyTorch runs it without
gradients. Where CPU and GPU differ (copies that a convolution makes of its operands, norms that a CPU computes in
float32), the larger counts. Tests compare them with what the allocator records.

Sizes are in pixels, results in bytes, weights not included.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain

import torch
from torch import nn

from ..config import DCAEConfig
from .convolution import ConvLayer
from .dc_ae import DCAE, DecoderIn, EfficientViTBlock, EncoderOut, OpSequential, ResBlock
from .resampling import Downsample, InterpolateConv, PixelShuffleConv, PixelUnshuffleConv, Upsample
from .tiling import Grid, Step, decoder_steps, default_tile, encoder_steps, geometry

FLOAT = 4  # bytes of float32, in which norms are computed and into which operands may be copied
SCRATCH = 2**20  # what kernels take whatever the size
SUB_PIXEL_COPIES = 4  # of a 3x3 weight in float32, as its sums are made
MARGIN = 1.15  # for what the allocator cannot give back in one piece


def decode_memory(config: DCAEConfig, height: int, width: int, dtype: torch.dtype, tile: int | None = None) -> int:
    """Bytes to decode one picture of height x width pixels, latent and pixels included.

    tile: latent positions a side, as for decode_tiled; None stands for the whole at once, as `DCAE.decode` does it.
    """
    skeleton = _skeleton(config)
    size = _latent_size(config, height, width)
    if tile is None:
        return _whole_memory(skeleton.decoder, size, config.latent_channels, dtype)
    steps = decoder_steps(skeleton.decoder, config.spatial_compression)
    return _tiled_memory(steps, size, Grid.of(*size, tile), config.latent_channels, dtype)


def encode_memory(config: DCAEConfig, height: int, width: int, dtype: torch.dtype, tile: int | None = None) -> int:
    """Bytes to encode one picture, as decode_memory."""
    skeleton = _skeleton(config)
    compression = config.spatial_compression
    rows, columns = _latent_size(config, height, width)
    size = (rows * compression, columns * compression)
    if tile is None:
        return _whole_memory(skeleton.encoder, size, 3, dtype)
    steps = encoder_steps(skeleton.encoder, compression)
    return _tiled_memory(steps, size, Grid.of(rows, columns, tile), 3, dtype)


def choose_tile(config: DCAEConfig, memory: Callable[[int], int], available: int | None) -> int:
    """Largest tile of at most 1024 pixels a side for which `memory(tile)` bytes are available, else the smallest.

    None for what is available, when nobody knows, takes 1024 pixels.
    """
    tile = default_tile(config.spatial_compression)
    while available is not None and tile > 1 and memory(tile) > available:
        tile //= 2
    return tile


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors on a GPU can still take, PyTorch's own reserve included; None for other devices.

    A CPU swaps rather than fails, and how much is free there is for the user to say.
    """
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


@lru_cache(maxsize=4)
def _skeleton(config: DCAEConfig) -> DCAE:
    """The modules, without memory for weights."""
    return DCAE(config, device="meta")


def _latent_size(config: DCAEConfig, height: int, width: int) -> tuple[int, int]:
    return tuple(-(-side // config.spatial_compression) for side in (height, width))


def _whole_memory(network: nn.Module, size: tuple[int, int], channels: int, dtype: torch.dtype) -> int:
    """Peak of encoder or decoder run operation by operation."""
    positions = size[0] * size[1]
    given = peak = positions * channels * dtype.itemsize
    for op in _operations(network):
        peak = max(peak, given + _working_set(op, positions, channels, dtype))
        positions = geometry(op).made(geometry(op).made(positions))
        channels = output_channels(op)
    return int(MARGIN * peak) + SCRATCH


def _operations(network: nn.Module) -> list[nn.Module]:
    stages = [list(stage.op_list) for stage in network.stages]
    if isinstance(network.project_in, DecoderIn):
        stages.reverse()
    return [network.project_in, *chain.from_iterable(stages), network.project_out]


def _tiled_memory(steps: list[Step], size: tuple[int, int], grid: Grid, channels: int, dtype: torch.dtype) -> int:
    """Peak of the steps: what is held whole before and after one, and its largest tile."""
    given = size[0] * size[1] * channels * dtype.itemsize
    held, peak = 0, given
    for step in steps:
        tiles = _largest_tiles(step, size, grid)
        tile_peak, inside = 0, channels
        for op, positions in zip(step.ops, tiles, strict=True):
            tile_peak = max(tile_peak, _working_set(op, positions, inside, dtype))
            inside = output_channels(op)
        size = (grid.rows[-1].stop * step.positions, grid.columns[-1].stop * step.positions)
        made = size[0] * size[1] * inside * dtype.itemsize
        peak = max(peak, given + held + made + tile_peak)
        held, channels = made, inside
    return int(MARGIN * peak) + SCRATCH


def _largest_tiles(step: Step, size: tuple[int, int], grid: Grid) -> list[int]:
    """Positions of the largest input that each operation gets."""
    sides = []
    for length, tiles in zip(size, (grid.rows, grid.columns), strict=True):
        spans = zip(*(step.spans(length, tile) for tile in tiles), strict=True)
        sides.append([max(span.stop - span.start for span in of_op) for of_op in spans])
    return [height * width for height, width in zip(*sides, strict=True)][:-1]


def output_channels(op: nn.Module) -> int:
    """Channels that an operation makes."""
    match op:
        case ConvLayer():
            return op.conv.out_channels
        case InterpolateConv():
            return op.conv.conv.out_channels
        case PixelShuffleConv():
            return op.conv.conv.out_channels // 4
        case PixelUnshuffleConv():
            return op.conv.conv.out_channels * 4
        case ResBlock():
            return output_channels(op.main.conv2)
        case EfficientViTBlock():
            return output_channels(op.local_module.main.point_conv)
        case EncoderOut():
            return op.latent_channels
        case DecoderIn() | Upsample() | Downsample():
            return op.out_channels
        case OpSequential():
            return output_channels(op.op_list[-1])
    raise TypeError(f"no channels for {type(op).__name__}")


def _working_set(op: nn.Module, positions: int, channels: int, dtype: torch.dtype) -> int:
    """Bytes of an operation's input, its output and what it holds in between, its weights copied included."""
    doubling = op.main if isinstance(op, Upsample) else op
    copies = SUB_PIXEL_COPIES if isinstance(doubling, InterpolateConv) else 1
    weights = copies * FLOAT * sum(parameter.numel() for parameter in op.parameters())
    per_position = channels * dtype.itemsize + _live_values(op, channels, output_channels(op), dtype.itemsize)
    return int(positions * per_position) + weights


def _live_values(op: nn.Module, channels: int, made: int, itemsize: int) -> float:
    """Bytes beside the input, for each position of the input, at the worst moment."""
    match op:
        case ResBlock():  # a convolution's input and result, or this normed
            return 2 * channels * itemsize + channels * FLOAT
        case EfficientViTBlock():  # the feed-forward: 8C before and after activation or depthwise convolution, copied
            return 25 * channels * itemsize
        case DecoderIn():  # convolution, duplicated channels
            return (channels + 3 * made) * itemsize
        case EncoderOut():  # convolution; means, and their input in float32
            return made * itemsize + (channels + 2 * made) * FLOAT
        case Downsample():  # convolution; space to depth, then means, and their input in float32
            return (channels + made / 2) * itemsize + channels * FLOAT
        case Upsample():  # the shortcut adds to what the convolution made
            return _live_values(op.main, channels, made, itemsize)
        case InterpolateConv():  # the whole, and one of four parts
            return (channels + 5 * made) * itemsize
        case PixelShuffleConv():  # convolution; the same as space
            return (channels + 2 * 4 * made) * itemsize
        case PixelUnshuffleConv():
            return (channels + 2 * made / 4) * itemsize
        case ConvLayer():
            return (channels + made / op.conv.stride[0] ** 2) * itemsize
        case OpSequential():  # the norm's result; or the convolution after it
            last = _live_values(op.op_list[-1], channels, made, itemsize)
            return channels * itemsize + max(channels * FLOAT, last)
    raise TypeError(f"no figure for {type(op).__name__}")
