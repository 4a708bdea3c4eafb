"""The autoencoder tile by tile, with the result of the whole picture: no blending, no seams, whatever the tile.

Convolutions see a few positions around. A tile is computed with that halo, which is cut where the picture ends, so
that zero padding happens only there, as it does for the whole; then the halo, wrong at its outer edge, is cropped.
The attention of EfficientViT sees everything, but only through K^T V and the sum of K, which are sums over positions:
a first pass adds them up over the tiles, in float32, a second one applies them.

Maps at an eighth of the picture's resolution and below are held whole, one going into a step and one coming out. Those
above, which would fill the memory, exist as tiles only: one step leads from an eighth to the pixels, or back.

Shapes: B batch, C channels, h and w the size of a feature map.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..kernels.reference import linear_attention_output, linear_attention_state
from .convolution import ConvLayer
from .dc_ae import (
    AGGREGATION_KERNEL,
    ATTENTION_EPS,
    DCAE,
    Decoder,
    DecoderIn,
    EfficientViTBlock,
    Encoder,
    EncoderOut,
    LiteMLA,
    OpSequential,
    ResBlock,
)
from .resampling import Downsample, InterpolateConv, PixelShuffleConv, PixelUnshuffleConv, Upsample

HELD_REDUCTION = 8  # pixels a side for each position of the finest map that is held whole
TILE_PIXELS = 1024  # a side of the tiles, where memory does not ask for smaller ones

Progress = Callable[[int, int], None]  # called after each tile with how many are done, and of how many


@dataclass(frozen=True)
class Geometry:
    """What an operation sees and makes, along each axis: `up` output positions for each `down` input positions.

    `before` and `after` say how many positions around its convolutions see, at the resolution of the input or of the
    output.
    """

    before: int = 0
    after: int = 0
    up: int = 1
    down: int = 1

    def made(self, positions: int) -> int:
        """Output positions for these input positions."""
        return positions * self.up // self.down

    def needed(self, span: slice, size: int) -> slice:
        """Input span, of an input of this size, that fixes the output's span; it starts on the grid of `down`."""
        start = (span.start - self.after) // self.up * self.down - self.before
        stop = -(-(span.stop + self.after) // self.up) * self.down + self.before
        return slice(max(0, start - start % self.down), min(size, stop + -stop % self.down))


@dataclass(frozen=True)
class Step:
    """Operations that lead from one held map to the next, computed tile by tile.

    `positions` is the output's resolution, in positions a side for each one of the latent.
    """

    ops: tuple[nn.Module, ...]
    positions: int

    @property
    def attention(self) -> LiteMLA | None:
        """The attention that must see the step's whole input first."""
        block = self.ops[0]
        return block.context_module.main if isinstance(block, EfficientViTBlock) else None

    def spans(self, size: int, tile: slice) -> list[slice]:
        """Input span of each operation along one axis, then the output's, for an input size and a tile of latents."""
        sizes = [size]
        for op in self.ops[:-1]:
            sizes.append(geometry(op).made(sizes[-1]))
        spans = [slice(tile.start * self.positions, tile.stop * self.positions)]
        for op, length in zip(reversed(self.ops), reversed(sizes), strict=True):
            spans.append(geometry(op).needed(spans[-1], length))
        return spans[::-1]


@dataclass(frozen=True)
class Grid:
    """Tiles of a picture, in positions of the latent."""

    rows: list[slice]
    columns: list[slice]

    @classmethod
    def of(cls, height: int, width: int, tile: int) -> "Grid":
        """Even tiles of at most `tile` positions a side. Raises ValueError for a tile below 1."""
        if tile < 1:
            raise ValueError(f"a tile has {tile} latent positions a side, expected 1 or more")
        return cls(_even_spans(height, tile), _even_spans(width, tile))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        return ((row, column) for row in self.rows for column in self.columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)


def default_tile(compression: int) -> int:
    """Latent positions a side of tiles of 1024 pixels."""
    return max(1, TILE_PIXELS // compression)


@torch.no_grad()
def decode_tiled(model: DCAE, latent: Tensor, tile: int | None = None, progress: Progress | None = None) -> Tensor:
    """What `model.decode` returns, in bounded memory: one picture after the other, each in tiles.

    Args:
        latent: unscaled [B, latent_channels, h, w].
        tile: latent positions a side; None takes tiles of 1024 pixels. The result does not depend on it.
        progress: called after each tile; may raise to stop.

    Returns:
        Pixels [B, 3, h * compression, w * compression], about in [-1, 1], unclamped, without gradients.

    Raises:
        ValueError: a tile below 1.
    """
    compression = model.config.spatial_compression
    grid = Grid.of(*latent.shape[-2:], tile or default_tile(compression))
    return _stream(decoder_steps(model.decoder, compression), latent, grid, progress)


@torch.no_grad()
def encode_tiled(model: DCAE, pixels: Tensor, tile: int | None = None, progress: Progress | None = None) -> Tensor:
    """What `model.encode` returns, in bounded memory: one picture after the other, each in tiles.

    Args:
        pixels: [B, 3, H, W] in [-1, 1]; H and W multiples of the compression.
        tile: latent positions a side; None takes tiles of 1024 pixels. The result does not depend on it.
        progress: called after each tile; may raise to stop.

    Returns:
        Unscaled latent [B, latent_channels, H / compression, W / compression], without gradients.

    Raises:
        ValueError: a side that is not a multiple of the compression, a tile below 1.
    """
    model.check_sides(pixels)
    compression = model.config.spatial_compression
    height, width = (side // compression for side in pixels.shape[-2:])
    grid = Grid.of(height, width, tile or default_tile(compression))
    return _stream(encoder_steps(model.encoder, compression), pixels, grid, progress)


def decoder_steps(decoder: Decoder, compression: int) -> list[Step]:
    """The decoder's operations, from the latent to the pixels."""
    ops = [op for stage in reversed(decoder.stages) for op in stage.op_list]
    return _steps([decoder.project_in, *ops, decoder.project_out], 1, compression)


def encoder_steps(encoder: Encoder, compression: int) -> list[Step]:
    """The encoder's operations, from the pixels to the latent."""
    ops = [op for stage in encoder.stages for op in stage.op_list]
    return _steps([encoder.project_in, *ops, encoder.project_out], compression, compression)


def geometry(op: nn.Module) -> Geometry:
    """What an operation of the autoencoder sees and makes. Raises TypeError for one that it does not have."""
    match op:
        case ConvLayer():
            return Geometry(before=op.conv.kernel_size[0] // 2, down=op.conv.stride[0])
        case DecoderIn() | EncoderOut():
            return Geometry(before=1)
        case ResBlock():
            return Geometry(before=2)  # of its two convolutions
        case EfficientViTBlock():
            aggregation = AGGREGATION_KERNEL // 2 if op.context_module.main.aggreg else 0
            return Geometry(before=aggregation + 1)  # and of the depthwise convolution
        case InterpolateConv():
            return Geometry(after=1, up=2)
        case PixelShuffleConv():
            return Geometry(before=1, up=2)
        case PixelUnshuffleConv():
            return Geometry(before=1, down=2)
        case Upsample() | Downsample():
            return geometry(op.main)  # the shortcut beside sees no neighbours
        case OpSequential():
            return geometry(op.op_list[-1])  # the decoder's end: norm and activation see no neighbours
    raise TypeError(f"no geometry for {type(op).__name__}")


def _steps(ops: Sequence[nn.Module], positions: int, compression: int) -> list[Step]:
    """Join the operations between two maps to hold. An attention begins a step, since it needs its whole input."""
    steps, joined, made = [], [], positions
    for op in ops:
        if joined and isinstance(op, EfficientViTBlock):
            steps.append(Step(tuple(joined), made))
            joined = []
        joined.append(op)
        made = geometry(op).made(made)
        if made * HELD_REDUCTION <= compression:
            steps.append(Step(tuple(joined), made))
            joined = []
    return [*steps, Step(tuple(joined), made)] if joined else steps


def _even_spans(size: int, tile: int) -> list[slice]:
    count = -(-size // tile)
    return [slice(*ends) for ends in pairwise(index * size // count for index in range(count + 1))]


def _stream(steps: list[Step], pictures: Tensor, grid: Grid, progress: Progress | None) -> Tensor:
    """Run the steps for one picture after the other."""
    tiles = pictures.shape[0] * len(grid) * sum(1 if step.attention is None else 2 for step in steps)
    tick = _counter(tiles, progress)
    results = []
    for picture in pictures.split(1):
        x = picture.contiguous(memory_format=torch.channels_last)
        for step in steps:
            x = _run(step, x, grid, tick)
        results.append(x.contiguous())
    return results[0] if len(results) == 1 else torch.cat(results)


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _run(step: Step, x: Tensor, grid: Grid, tick: Callable[[], None]) -> Tensor:
    """One step, from a whole map to the next."""
    functions: list[Callable[[Tensor], Tensor]] = list(step.ops)
    if step.attention is not None:
        functions[0] = partial(_attend, step.ops[0], _gather(step, x, grid, tick))
    out = None
    for row, column in grid:
        rows, columns = step.spans(x.shape[2], row), step.spans(x.shape[3], column)
        part = _run_tile(step.ops, functions, x, rows, columns)
        if out is None:
            out = _empty_whole(part, *(extent[-1].stop * step.positions for extent in (grid.rows, grid.columns)))
        out[..., rows[-1], columns[-1]] = part
        tick()
    return out


def _empty_whole(part: Tensor, height: int, width: int) -> Tensor:
    """A map of this size for tiles like this one, in the layout in which the operations run."""
    size = (*part.shape[:2], height, width)
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)


def _run_tile(ops, functions, x: Tensor, rows: list[slice], columns: list[slice]) -> Tensor:
    """One tile through all operations of a step. Each result loses what no later one needs."""
    part = x[..., rows[0], columns[0]]
    for index, (op, function) in enumerate(zip(ops, functions, strict=True)):
        made = geometry(op).made
        row, column = (_within(made(spans[index].start), spans[index + 1]) for spans in (rows, columns))
        part = function(part)[..., row, column]
    return part


def _within(start: int, span: slice) -> slice:
    """A span, counted from a start."""
    return slice(span.start - start, span.stop - start)


def _gather(step: Step, x: Tensor, grid: Grid, tick: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
    """K^T V and the sum of K over all positions of x [B, C, h, w], float32, for each scale of the attention."""
    attention = step.attention
    seen = Geometry(before=AGGREGATION_KERNEL // 2 if attention.aggreg else 0)
    gathered = [(0, 0)] * (1 + len(attention.aggreg))
    for row, column in grid:
        inner = [slice(span.start * step.positions, span.stop * step.positions) for span in (row, column)]
        outer = [seen.needed(span, size) for span, size in zip(inner, x.shape[-2:], strict=True)]
        # Each position counts once: its own tile's.
        rows, columns = (_within(around.start, span) for around, span in zip(outer, inner, strict=True))
        for scale, (_, k, v) in enumerate(attention.project_in(x[..., outer[0], outer[1]])):
            k, v = (part[:, rows, columns].flatten(1, 2) for part in (k, v))
            added = linear_attention_state(k, v)
            gathered[scale] = tuple(total + part for total, part in zip(gathered[scale], added, strict=True))
        tick()
    return gathered


def _attend(block: EfficientViTBlock, gathered: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """An EfficientViT block on a tile [B, C, h, w], with the attention to the whole map."""
    attention = block.context_module.main
    heads = [
        linear_attention_output(q.flatten(1, 2), *state, ATTENTION_EPS)
        for (q, _, _), state in zip(attention.project_in(x), gathered, strict=True)
    ]
    return block.local_module(attention.project_out(heads, x))
