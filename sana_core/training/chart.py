"""What a run looks like: its loss as a curve, with the newest samples below, in one picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..lettering import text_width, write_line

WIDTH, HEIGHT = 512, 192  # of the curve, pixels
MARGIN, LETTERS = 8, 12
_PAPER, _RAW, _SMOOTH, _INK = "white", "#c9d6e8", "#1f5fa8", "#333333"
_SMOOTHING = 0.9


def draw_run(losses: Sequence[float], samples: Sequence[Image.Image] = ()) -> Image.Image:
    """The curve of the losses and, below it, the samples side by side, all within the curve's width."""
    curve = draw_curve(losses)
    if not samples:
        return curve
    side = min(WIDTH // len(samples), WIDTH // 2)
    sheet = Image.new("RGB", (WIDTH, HEIGHT + side), _PAPER)
    sheet.paste(curve)
    for index, sample in enumerate(samples):
        small = sample.convert("RGB")
        small.thumbnail((side, side))
        sheet.paste(small, (index * side, HEIGHT))
    return sheet


def draw_curve(losses: Sequence[float]) -> Image.Image:
    """The losses of all steps, and their running mean in a darker colour, with the range that they span.

    What is not finite is left out.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    finite = [loss for loss in losses if abs(loss) < float("inf")]
    if not finite:
        return picture
    raw, smooth = _fitted(finite), _fitted(_running_mean(finite))
    low, high = min(raw), max(raw)
    pen = ImageDraw.Draw(picture)
    for values, colour, width in ((raw, _RAW, 1), (smooth, _SMOOTH, 2)):
        pen.line(_points(values, low, high), colour, width)
    write_line(picture, f"{high:.4f}", MARGIN, MARGIN, LETTERS, _INK)
    write_line(picture, f"{low:.4f}", MARGIN, HEIGHT - MARGIN - LETTERS, LETTERS, _INK)
    label = f"{len(losses)}: {_running_mean(finite)[-1]:.4f}"
    write_line(picture, label, WIDTH - MARGIN - text_width(label, LETTERS), MARGIN, LETTERS, _INK)
    return picture


def _running_mean(losses: Sequence[float]) -> list[float]:
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(_SMOOTHING * means[-1] + (1 - _SMOOTHING) * loss)
    return means


def _fitted(values: Sequence[float]) -> list[float]:
    """No more values than pixels: means of equal stretches."""
    count = min(len(values), WIDTH)
    edges = [index * len(values) // count for index in range(count + 1)]
    return [sum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)]


def _points(values: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    """Pixels of the values from left to right. A single one is a line across."""
    values = list(values) * 2 if len(values) == 1 else values
    across, down = WIDTH - 1, HEIGHT - 1 - 2 * MARGIN
    span = high - low or 1.0
    return [
        (index / (len(values) - 1) * across, MARGIN + (high - value) / span * down)
        for index, value in enumerate(values)
    ]
