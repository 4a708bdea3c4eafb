"""Picture sizes that the models were trained on: one table of aspect ratios for each base size.

Source: NVlabs/Sana `diffusion/data/datasets/utils.py`. Ratios are height / width, sizes are in pixels. The tables of
512, 2048 and 4096 px are exact multiples of the one for 1024 px.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Height and width of a picture in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


_HEIGHT_X_WIDTH_1024 = """
0.25:512x2048 0.26:512x1984 0.27:512x1920 0.28:512x1856 0.32:576x1792 0.33:576x1728 0.35:576x1664 0.4:640x1600
0.42:640x1536 0.48:704x1472 0.5:704x1408 0.52:704x1344 0.57:768x1344 0.6:768x1280 0.68:832x1216 0.72:832x1152
0.78:896x1152 0.82:896x1088 0.88:960x1088 0.94:960x1024 1.0:1024x1024 1.07:1024x960 1.13:1088x960 1.21:1088x896
1.29:1152x896 1.38:1152x832 1.46:1216x832 1.67:1280x768 1.75:1344x768 2.0:1408x704 2.09:1472x704 2.4:1536x640
2.5:1600x640 2.89:1664x576 3.0:1728x576 3.11:1792x576 3.62:1856x512 3.75:1920x512 3.88:1984x512 4.0:2048x512
"""

# Most of a quarter of the 1024 px table does not fit the 32 px grid of the autoencoder, so 256 px has its own bins of
# about the same area.
_HEIGHT_X_WIDTH_256 = """
0.25:128x512 0.38:160x416 0.55:192x352 0.78:224x288 1.0:256x256 1.29:288x224 1.83:352x192 2.6:416x160 4.0:512x128
"""

_TRAINING_ONLY = frozenset((0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88))  # left out of the official inference tables


def _read_table(text: str) -> dict[float, Size]:
    entries = (entry.split(":") for entry in text.split())
    return {float(ratio): Size(*map(int, size.split("x"))) for ratio, size in entries}


def _scaled(table: dict[float, Size], factor: float) -> dict[float, Size]:
    return {ratio: Size(int(size.height * factor), int(size.width * factor)) for ratio, size in table.items()}


_TABLE_1024 = _read_table(_HEIGHT_X_WIDTH_1024)

ASPECT_RATIOS: dict[int, dict[float, Size]] = {  # base size in pixels -> ratio -> size; training uses all of them
    256: _read_table(_HEIGHT_X_WIDTH_256),
    512: _scaled(_TABLE_1024, 0.5),
    1024: _TABLE_1024,
    2048: _scaled(_TABLE_1024, 2),
    4096: _scaled(_TABLE_1024, 4),
}

INFERENCE_ASPECT_RATIOS: dict[int, dict[float, Size]] = {  # the official choice for sampling
    base: {ratio: size for ratio, size in table.items() if base > 1024 or ratio not in _TRAINING_ONLY}
    for base, table in ASPECT_RATIOS.items()
}


def nearest_size(height: int, width: int, table: dict[float, Size]) -> Size:
    """The table's size whose ratio height / width is nearest, as the official code picks it."""
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} is not a picture size: width and height must be positive")
    return table[min(table, key=lambda ratio: abs(ratio - height / width))]


def check_size(height: int, width: int, multiple: int = 32) -> None:
    """Raise ValueError, naming the nearest sizes that work, unless both sides are multiples of the compression."""
    if min(height, width) < multiple or height % multiple or width % multiple:
        down, up = (Size(_rounded(height, multiple, to), _rounded(width, multiple, to)) for to in (0, multiple - 1))
        nearest = str(down) if down == up else f"{down} or {up}"
        raise ValueError(
            f"cannot make a {width}x{height} picture: width and height must be multiples of {multiple}, which one "
            f"position of the latent stands for. The nearest sizes are {nearest}"
        )


def _rounded(side: int, multiple: int, offset: int) -> int:
    return max((side + offset) // multiple, 1) * multiple
