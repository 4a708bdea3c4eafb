"""Styles against what the official demo's own function gives."""

import pytest

from sana_core.styles import NO_STYLE, STYLES, apply_style

NAMES = [
    "(No style)", "Cinematic", "Photographic", "Anime", "Manga", "Digital Art", "Pixel art", "Fantasy art", "Neonpunk",
    "3D Model",
]  # fmt: skip


def test_names_are_those_of_the_demo():
    assert list(STYLES) == NAMES


def test_a_style_goes_around_the_prompt_and_before_the_negative_prompt():
    assert apply_style("Anime", "a 🐼", "blurry") == (
        "anime artwork a 🐼 . anime style, key visual, vibrant, studio anime,  highly detailed",
        "photo, deformed, black and white, realism, disfigured, low contrast, blurry",
    )


def test_no_style_changes_nothing():
    assert apply_style(NO_STYLE, " a {prompt} ", "blurry") == (" a {prompt} ", "blurry")


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_style_keeps_the_prompt_and_names_something_to_avoid(name):
    prompt, negative = apply_style(name, "a {braced} 🐼")
    assert prompt.count("a {braced} 🐼") == 1 and "{prompt}" not in prompt
    assert negative == STYLES[name].negative != ""


def test_an_unknown_style_is_refused_with_the_names():
    with pytest.raises(ValueError, match="no style 'anime'.*Cinematic, Photographic, Anime"):
        apply_style("anime", "a cat")
