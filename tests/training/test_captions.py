"""Caption files, and the choice among several captions, by hand."""

import math
import random

import pytest

from sana_core.training.captions import Caption, CaptionChoice, clean_caption, decode_caption

OFFICIAL = CaptionChoice()


def scored(*scores):
    return [Caption(str(index), score) for index, score in enumerate(scores)]


@pytest.mark.parametrize(
    "scores, weights",
    [
        ((26, 28), (26**10 / (26**10 + 28**10), 28**10 / (26**10 + 28**10))),  # p ~ score^(1 / 0.1)
        ((30, 20), (1, 0)),  # 20 is below the threshold of 25
        ((25, 24.9), (1, 0)),  # 25 is not
        ((20, 22, 21), (0, 1, 0)),  # none passes: the best
        ((22, 22), (1, 0)),  # and of equals the first
        ((None, 30, None), (0, 1, 0)),  # captions without a score are no candidates beside one that has it
        ((None, 3), (0, 1)),
        ((None, None, None, None), (0.25, 0.25, 0.25, 0.25)),
        ((None,), (1,)),
        ((-2, -1), (0, 1)),
    ],
)
def test_weights(scores, weights):
    assert OFFICIAL.weights(scored(*scores)) == pytest.approx(weights)


def test_temperature_and_threshold():
    assert CaptionChoice(0, 1).weights(scored(10, 30)) == pytest.approx([0.25, 0.75])
    assert CaptionChoice(0, 0.5).weights(scored(1, 3)) == pytest.approx([0.1, 0.9])
    assert CaptionChoice(0, 1).weights(scored(0, 30)) == pytest.approx([0, 1])
    assert CaptionChoice(0, 0).weights(scored(10, 30)) == pytest.approx([3**-100, 1])  # upstream stops at 0.01


def test_draws_follow_the_weights_and_the_generator():
    captions = scored(26, 28, 10)
    rng = random.Random(0)
    drawn = [OFFICIAL.draw(captions, rng) for _ in range(4000)]
    assert drawn.count(0) / 4000 == pytest.approx(OFFICIAL.weights(captions)[0], abs=0.03)
    assert drawn.count(2) == 0
    again = random.Random(0)
    assert drawn[:50] == [OFFICIAL.draw(captions, again) for _ in range(50)]


@pytest.mark.parametrize(
    "content, text",
    [
        (b"  a cat \r\n on a mat \r\n\r\n", "a cat \n on a mat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"\xef\xbb\xbf \r\n", ""),
        (b"", ""),
        ("红色背景左边的🐼\n".encode(), "红色背景左边的🐼"),
        ("קנגורו 👩‍🚀".encode(), "קנגורו 👩‍🚀"),
        ("cafe\u0301".encode(), "caf\u00e9"),
        ("\ufeff红色 cat\r\n".encode("utf-16-le"), "红色 cat"),
        ("\ufeff红色 cat".encode("utf-16-be"), "红色 cat"),
    ],
)
def test_caption_files(content, text):
    assert decode_caption(content) == text


@pytest.mark.parametrize(
    "content, said",
    [
        ("über".encode("latin-1"), "not UTF-8 .byte 0 is 0xfc"),
        ("\ufeffa cat".encode("utf-16-le")[:-1], "not UTF-16 .*save it as UTF-8"),
        ("a cat".encode("utf-32"), "NUL bytes"),
        ("a cat".encode("utf-16-le"), "NUL bytes"),
        ("红色".encode("gbk"), "not UTF-8"),
    ],
)
def test_other_encodings_are_refused(content, said):
    with pytest.raises(ValueError, match=said):
        decode_caption(content)


@pytest.mark.parametrize(
    "threshold, temperature, said", [(math.nan, 0.1, "threshold is nan"), (25, -1, "is -1, expected 0 or more")]
)
def test_a_choice_that_makes_no_sense_is_refused(threshold, temperature, said):
    with pytest.raises(ValueError, match=said):
        CaptionChoice(threshold, temperature)


def test_half_an_emoji_can_be_encoded_all_the_same():
    assert clean_caption("a \ud83d cat") == "a \ufffd cat"
    assert clean_caption("a \ud83d\udc3c") == "a 🐼"
