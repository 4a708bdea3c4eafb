"""Sana X/Y Values and Sana X/Y Grid: every pair once, each picture in its place."""

import pytest
import torch

PLAIN = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])


@pytest.fixture
def values(part):
    return lambda *arguments: part("nodes.grid").SanaXYValues.execute(*arguments).result


@pytest.fixture
def sheet(part):
    return lambda images, layout: part("nodes.grid").SanaXYGrid.execute(images, [layout]).result[0]


def test_every_pair_row_after_row(values):
    x, y, layout = values("5, 10,20", "1|4.5", "steps", "cfg")
    assert (x, y) == ([5, 10, 20, 5, 10, 20], [1.0, 1.0, 1.0, 4.5, 4.5, 4.5])
    assert [type(value) for value in (x[0], y[0])] == [int, float]
    assert (layout.x.labels, layout.y.labels) == (["steps 5", "steps 10", "steps 20"], ["cfg 1", "cfg 4.5"])


@pytest.mark.parametrize("text, kind", [("1,-2", int), ("1,2.0", float), ("1e-3", float), ("1,two", str)])
def test_values_are_of_one_kind(values, text, kind):
    assert {type(value) for value in values(text)[0]} == {kind}


def test_without_y_there_is_one_row(values):
    x, y, layout = values("a cat, asleep | a dog", " \n", "", "cfg")
    assert (x, y) == (["a cat, asleep", "a dog"], ["", ""])
    assert layout.y.labels == [""]


@pytest.mark.parametrize("x, y", [("", "1"), ("1,,2", "1"), ("1", "2,")])
def test_empty_values_are_refused(values, x, y):
    with pytest.raises(ValueError, match="expected one or more, with commas between them"):
        values(x, y)


def test_each_picture_stands_in_its_place(values, sheet):
    layout = values("1,2,3", "4,5")[2]
    images = [colour.expand(1, 32, 64, 3) for colour in PLAIN]
    found = sheet(images, layout)
    assert found.ndim == 4 and found.shape[0] == 1 and found.shape[3] == 3 and found.dtype == torch.float32
    height, width = found.shape[1:3]
    for row in range(2):
        for column in range(3):
            y, x = height - (2 - row) * 40 + 16, width - (3 - column) * 72 + 32
            assert torch.equal(found[0, y, x], PLAIN[3 * row + column])


def test_a_batch_stands_side_by_side(values, sheet):
    layout = values("1")[2]
    found = sheet([PLAIN[:2, None, None].expand(2, 32, 64, 3)], layout)
    assert torch.equal(found[0, -24, -8 - 96], PLAIN[0]) and torch.equal(found[0, -24, -8 - 32], PLAIN[1])


def test_another_number_of_pictures_is_refused(values, sheet):
    layout = values("1,2,3", "4,5")[2]
    with pytest.raises(ValueError, match="5 pictures came for 3 columns and 2 rows. Connect x and y"):
        sheet([torch.zeros(1, 32, 32, 3)] * 5, layout)
