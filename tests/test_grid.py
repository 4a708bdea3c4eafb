"""The sheet of an X/Y grid, and the lists of values that it is about."""

import numpy as np
import pytest
from PIL import Image

from sana_core.grid import LARGEST, LINE, MARGIN, Axis, draw_grid, split_values

COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]


def plain(size=(96, 32)):
    return [Image.new("RGB", size, colour) for colour in COLOURS]


def test_pictures_are_in_rows_with_labels_around_them():
    sheet = draw_grid(plain(), ["steps 5", "steps 10", "steps 20"], ["cfg 1", "cfg 4.5"])
    pixels = np.asarray(sheet)
    left, top = sheet.width - 3 * (96 + MARGIN), MARGIN + LINE
    for row in range(2):
        for column in range(3):
            x, y = left + column * (96 + MARGIN), top + row * (32 + MARGIN)
            inside = pixels[y : y + 32, x : x + 96]
            assert np.array_equal(inside, np.asarray(plain()[3 * row + column])), (row, column)
        assert (pixels[top + row * 40 : top + row * 40 + 32, :left] < 100).any(), "the row's label"
    for column in range(3):
        assert (pixels[:top, left + column * 104 : left + column * 104 + 96] < 100).any(), "the column's label"


def test_without_labels_there_is_no_room_for_them():
    assert draw_grid(plain(), [""] * 3, [""] * 2).size == (MARGIN + 3 * 104, MARGIN + 2 * 40)


def test_sizes_may_differ_and_large_pictures_are_shown_smaller():
    pictures = [Image.new("RGB", (2048, 1024), "red"), Image.new("RGBA", (100, 100), "blue")]
    sheet = draw_grid(pictures, ["a", "b"], [""])
    assert sheet.size == (MARGIN + 2 * (LARGEST + MARGIN), MARGIN + LINE + LARGEST // 2 + MARGIN)
    blue = np.argwhere((np.asarray(sheet) == (0, 0, 255)).all(axis=2))
    assert (blue.max(axis=0) - blue.min(axis=0)).tolist() == [99, 99]
    middle = MARGIN + LARGEST + MARGIN + LARGEST // 2
    assert abs(blue[:, 1].mean() - middle) < 1


@pytest.mark.parametrize("pictures, columns, rows", [(5, 3, 2), (7, 3, 2), (0, 0, 0), (0, 3, 1)])
def test_every_pair_has_one_picture(pictures, columns, rows):
    with pytest.raises(ValueError, match=f"{pictures} pictures for a grid of {columns} columns and {rows} rows"):
        draw_grid((plain() + plain())[:pictures], ["x"] * columns, ["y"] * rows)


@pytest.mark.parametrize(
    "text, values",
    [
        ("10, 20,40", ["10", "20", "40"]),
        ("7", ["7"]),
        ("a cat, asleep | a dog, awake", ["a cat, asleep", "a dog, awake"]),
        ("4.5\n, 7\n", ["4.5", "7"]),
    ],
)
def test_values_are_between_commas_or_bars(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["", " ", ",", "1,,2", "1,2,", "a||b"])
def test_empty_values_are_refused(text):
    with pytest.raises(ValueError, match="expected one or more, with commas between them"):
        split_values(text)


def test_labels_name_the_setting():
    assert Axis("steps", (5, 10)).labels == ["steps 5", "steps 10"]
    assert Axis("", ("a cat",)).labels == ["a cat"]
