"""X/Y grids: pictures over two lists of values, on one sheet with labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .lettering import text_width, wrap_text, write_line

MARGIN = 8  # pixels between pictures
LETTERS = 20  # pixels
LINE = 26  # pixels from one line of a label to the next
LINES = 4  # of a label
ROW_LABEL = 240  # pixels that a row's label may be wide
LARGEST = 512  # pixels a side: larger pictures are shown smaller, since the sheet is for comparing


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes along the columns or the rows."""

    name: str
    values: tuple

    @property
    def labels(self) -> list[str]:
        """What stands beside each value's pictures."""
        return [f"{self.name} {value}".strip() for value in self.values]


def split_values(text: str) -> list[str]:
    """The values in a text, between commas; where a bar is in it, between bars, so that values may hold commas.

    Raises ValueError where one is empty, or all.
    """
    separator = "|" if "|" in text else ","
    values = [value.strip() for value in text.split(separator)]
    if not all(values):
        raise ValueError(
            f"the values are {text!r}: expected one or more, with commas between them, or with | where they hold commas"
        )
    return values


def draw_grid(pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """The sheet: pictures in rows, a label over each column and left of each row.

    pictures: row after row, len(columns) * len(rows) of them. Sizes may differ.

    Raises ValueError for another number of pictures.
    """
    if not pictures or len(pictures) != len(columns) * len(rows):
        raise ValueError(
            f"{len(pictures)} pictures for a grid of {len(columns)} columns and {len(rows)} rows: expected "
            f"{len(columns) * len(rows)}"
        )
    shown = [_shown(picture) for picture in pictures]
    width, height = (max(sides) for sides in zip(*(picture.size for picture in shown), strict=True))
    heads = [wrap_text(label, LETTERS, width, LINES) for label in columns]
    sides = [wrap_text(label, LETTERS, ROW_LABEL, LINES) for label in rows]
    left = MARGIN + max(text_width(line, LETTERS) for lines in [*sides, [""]] for line in lines or [""])
    top = MARGIN + LINE * max(len(lines) for lines in heads)
    left += MARGIN if left > MARGIN else 0
    sheet = Image.new("RGB", (left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN)), "white")
    for column, lines in enumerate(heads):
        _write(sheet, lines, left + column * (width + MARGIN), top - MARGIN // 2 - LINE * len(lines))
    for row, lines in enumerate(sides):
        y = top + row * (height + MARGIN)
        _write(sheet, lines, MARGIN, y + (height - LINE * len(lines)) // 2)
        for column, picture in enumerate(shown[row * len(columns) : (row + 1) * len(columns)]):
            x = left + column * (width + MARGIN)
            sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return sheet


def _shown(picture: Image.Image) -> Image.Image:
    shown = picture.convert("RGB")
    shown.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return shown


def _write(sheet: Image.Image, lines: Sequence[str], x: int, y: int) -> None:
    for number, line in enumerate(lines):
        write_line(sheet, line, x, y + number * LINE, LETTERS)
