"""The picture of a run shows where the loss is."""

import numpy as np
import pytest

from sana_core.training.chart import HEIGHT, MARGIN, WIDTH, draw_curve, draw_run

from .pictures import picture


def rows(curve, column):
    """Which pixels of a column are drawn on."""
    return (np.asarray(curve)[:, column] != 255).any(-1).nonzero()[0]


def test_the_highest_loss_is_on_top():
    curve = draw_curve([4.0, 1.0, 2.0, 3.0, 1.0])
    assert abs(rows(curve, 0).min() - MARGIN) <= 1
    assert abs(rows(curve, WIDTH - 1).max() - (HEIGHT - 1 - MARGIN)) <= 1


@pytest.mark.parametrize("losses", [[], [1.0], [1.0] * 3, [1.0, float("nan"), 2.0], [float("inf")], [1.0, 2.0] * 9999])
def test_any_run_can_be_drawn(losses):
    assert draw_run(losses).size == (WIDTH, HEIGHT)


def test_samples_are_below_side_by_side():
    samples = [picture(64, 64, 1), picture(128, 64, 2), picture(2000, 2000, 3)]
    sheet = draw_run([1.0, 2.0], samples)
    side = WIDTH // 3
    assert sheet.size == (WIDTH, HEIGHT + side)
    assert np.array_equal(np.asarray(sheet.crop((0, HEIGHT, 64, HEIGHT + 64))), np.asarray(samples[0]))
    for index in range(3):
        assert sheet.getpixel((index * side + 5, HEIGHT + 5)) != (255, 255, 255)
