"""Text in pictures: it is there, it fits, and letters that Pillow's font lacks come from others."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_core import lettering
from sana_core.lettering import text_width, wrap_text, write_line

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOWHERE = "\U0010fffd"  # for private use, at the very end of Unicode


@pytest.fixture(autouse=True)
def fresh_fonts():
    lettering._font_of.cache_clear()
    lettering._advance.cache_clear()
    lettering._missing_scripts.clear()


def drawn(text, size=20):
    sheet = Image.new("RGB", (400, 40), "white")
    write_line(sheet, text, 10, 5, size)
    return np.asarray(sheet)


def test_letters_are_where_the_width_says():
    ink = (drawn("a panda") < 128).any(axis=2)
    columns, rows = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
    assert 10 <= columns[0] <= 14 and abs(columns[-1] - (10 + text_width("a panda", 20))) <= 3
    assert 5 <= rows[0] and rows[-1] <= 5 + 26


@pytest.mark.skipif(not EMOJI_FONT.is_file(), reason=f"{EMOJI_FONT} is missing")
def test_emoji_are_in_colour_and_as_high_as_the_letters():
    picture = drawn("🟥").astype(int)
    red = picture[..., 0] - picture[..., 1] > 100
    rows = np.flatnonzero(red.any(axis=1))
    assert 12 <= rows[-1] - rows[0] <= 26
    assert text_width("🟥\N{VARIATION SELECTOR-16}", 20) == text_width("🟥", 20)


def test_other_letters_come_from_a_system_font(monkeypatch):
    """The font is asked for by name: here one that has every letter that Pillow's own lacks."""
    own = drawn("猫")
    if lettering._font_of("猫", 20).getname() == lettering._font_of("a", 20).getname():
        pytest.skip("no font with Chinese letters here: install fonts-noto-cjk")
    lettering._font_of.cache_clear()
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    assert not np.array_equal(own, drawn("猫"))


def test_a_letter_of_no_font_is_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert (drawn(NOWHERE * 2) < 128).any(), "a box stands for it"
    assert caplog.text.count("no font of this computer has") == 1 and "fonts-noto-cjk" in caplog.text


def test_a_sentence_without_a_font_is_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    with caplog.at_level(logging.WARNING):
        text_width("红色背景 and 熊猫", 20)
    assert caplog.text.count("no font of this computer has") == 1 and "红" in caplog.text


def test_text_is_wrapped_between_words():
    text = "a panda on the left of a red background"
    lines = wrap_text(text, 20, 150, 9)
    assert " ".join(lines) == text and len(lines) >= 3
    assert all(text_width(line, 20) <= 150 for line in lines)


def test_long_words_are_broken_and_nothing_is_lost():
    lines = wrap_text("W" * 40, 20, 100, 99)
    assert "".join(lines) == "W" * 40 and all(text_width(line, 20) <= 100 for line in lines)
    assert wrap_text("WWW", 20, 1, 9) == ["W", "W", "W"], "one letter a line, where none fits"


def test_the_work_grows_with_the_text_and_not_with_its_square(monkeypatch):
    """A paragraph of Chinese is one word, and a graph may hold any text."""
    asked = []
    monkeypatch.setattr(lettering, "_advance", lambda character, size: asked.append(character) or 10)
    lines = wrap_text("猫" * 20_000, 20, 100, 4)
    assert lines == ["猫" * 10] * 3 + ["猫" * 9 + "…"]
    assert len(asked) < 20 * 20_000


def test_what_exceeds_the_lines_ends_in_an_ellipsis():
    lines = wrap_text("one two three four five six seven", 20, 90, 2)
    assert len(lines) == 2 and lines[1].endswith("…") and text_width(lines[1], 20) <= 90
    assert wrap_text("", 20, 90, 2) == []
