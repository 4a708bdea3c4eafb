"""The best of N: which pictures are drawn, which one is kept."""

import pytest
from PIL import Image

from sana_core.evaluation import best_of, load_scorer, ranking


def pipe(prompt, *, seed, steps):
    """Stands for a pipeline: the seed's colour tells which picture it is."""
    return [Image.new("RGB", (8, 8), (seed, steps, len(prompt)))]


def colours(pictures):
    return [picture.getpixel((0, 0)) for picture in pictures]


def test_the_scorer_sees_all_seeds_at_once_and_its_best_is_kept():
    seen = []

    def scorer(pictures, prompts):
        seen.append((colours(pictures), prompts))
        return [3, 9, -1, 9]

    found = best_of(pipe, "a cat", 4, scorer, seed=10, steps=2)
    assert seen == [([(10, 2, 5), (11, 2, 5), (12, 2, 5), (13, 2, 5)], ["a cat"] * 4)]
    assert (found.seed, found.scores) == (11, {10: 3.0, 11: 9.0, 12: -1.0, 13: 9.0})
    assert colours([found.picture]) == [(11, 2, 5)]


@pytest.mark.parametrize(
    "prompt, sides, message",
    [
        ("a lighthouse", {}, "'a lighthouse' names no subject"),
        ("a panda", {"width": 512, "height": 256}, "256 x 256 pixels, and one has 512 x 256"),
    ],
)
def test_what_the_scorer_could_not_judge_is_not_drawn(prompt, sides, message):
    drawn = []
    with pytest.raises(ValueError, match=message):
        best_of(lambda *_, **settings: drawn.append(settings), prompt, 4, load_scorer("nano"), seed=1, **sides)
    assert drawn == []


def test_none_is_no_choice():
    with pytest.raises(ValueError, match="best of 0: expected 1 or more"):
        best_of(pipe, "a cat", 0, lambda *_: [], seed=1, steps=1)


def test_nan_is_no_score():
    with pytest.raises(ValueError, match="nan for picture 0"):
        best_of(pipe, "a cat", 1, lambda *_: [float("nan")], seed=1, steps=1)


def test_ranking_is_stable():
    assert ranking([1.0, 3.0, 3.0, -2.0]) == [1, 2, 0, 3]
