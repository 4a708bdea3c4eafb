"""sana-nano's own score: whether its pictures show the background, the place and the subject of their prompt."""

import re
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image

from .judge import Guess, Scores, evaluate, score
from .scenes import (
    BACKGROUNDS,
    HELD_OUT,
    LANGUAGES,
    PLACES,
    SIDE,
    SUBJECTS,
    Background,
    Place,
    Scene,
    Subject,
    caption,
)

BATCH = 20  # pictures that sana-nano draws at once
_SIGN = "\N{VARIATION SELECTOR-16}"  # keyboards differ in sending it


class NanoScorer:
    """A scorer: how many of the background, place and subject that the prompt names the picture shows, up to 3.

    After the point stands how like the picture is to the glyph that it resembles most, so that of two pictures that
    show the same the clearer one wins.
    """

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score for each picture of 256 x 256 pixels.

        Raises ValueError for pictures of another size, and where a prompt names nothing of nano's.
        """
        for picture, prompt in zip(pictures, prompts, strict=True):
            self.check([prompt], picture.size)
        wanted = [named_parts(prompt) for prompt in prompts]
        guesses = [score(np.asarray(picture.convert("RGB"))) for picture in pictures]
        return [_hits(guess, parts) + guess.likeness for guess, parts in zip(guesses, wanted, strict=True)]

    def check(self, prompts: Sequence[str], size: tuple[int, int] | None) -> None:
        """Raises ValueError for prompts that name nothing of nano's, and for another size than 256 x 256."""
        for prompt in prompts:
            named_parts(prompt)
        if size not in (None, (SIDE, SIDE)):
            raise ValueError(
                f"sana-nano's scorer judges pictures of {SIDE} x {SIDE} pixels, and one has {size[0]} x {size[1]}. "
                "Draw them in that size, or choose a CLIP scorer"
            )


def named_parts(prompt: str) -> list[Subject | Background | Place]:
    """Subject, background and place that a prompt in English, Chinese or emoji names: one to three of them.

    Raises ValueError where it names none.
    """
    text = prompt.casefold().replace(_SIGN, "")
    parts = [part for names in (_subject_names(), _background_names(), _place_names()) if (part := _find(text, names))]
    if not parts:
        raise ValueError(
            f"the prompt {prompt!r} names no subject, background or place that sana-nano knows. Its scorer judges "
            'prompts such as "a panda on the left of a red background"'
        )
    return parts


def draw_scenes(pipe, wanted: Sequence[Scene], language: str) -> list[np.ndarray]:
    """Pictures (uint8 [256, 256, 3]) of the scenes' captions in a language, by the pipeline's defaults."""
    rng = np.random.default_rng(3)
    captions = [caption(scene, language, rng) for scene in wanted]
    pictures = []
    for start in range(0, len(captions), BATCH):
        pictures += pipe(captions[start : start + BATCH], height=SIDE, width=SIDE, seed=start)
    return [np.array(picture) for picture in pictures]


def score_held_out(pipe, count: int) -> dict[str, Scores]:
    """Draw the first `count` combinations that training never saw, in each language, and score them.

    Raises ValueError for a count that is not 1 to 500.
    """
    if not 1 <= count <= len(HELD_OUT):
        raise ValueError(f"{count} held-out combinations asked for: there are 1 to {len(HELD_OUT)}")
    wanted = HELD_OUT[:count]
    return {language: evaluate(draw_scenes(pipe, wanted, language), wanted) for language in LANGUAGES}


def _hits(guess: Guess, parts: Iterable[Subject | Background | Place]) -> int:
    return sum(part in (guess.subject, guess.background, guess.place) for part in parts)


def _find(text: str, names: dict[str, object]):
    """What the longest name in the text stands for: 熊猫 is a panda and no cat (猫), nor is a carrot a car."""
    found = [name for name in names if re.search(_whole_word(name), text)]
    return names[max(found, key=len)] if found else None


def _whole_word(name: str) -> str:
    return rf"\b{re.escape(name)}\b" if name.isascii() else re.escape(name)


@cache
def _subject_names() -> dict[str, Subject]:
    return _names({item: (item.name, item.zh, item.emoji) for item in SUBJECTS})


@cache
def _background_names() -> dict[str, Background]:
    return _names({item: (item.name, item.zh, item.square, item.circle) for item in BACKGROUNDS})


@cache
def _place_names() -> dict[str, Place]:
    return _names({item: (item.name, *item.phrases, *item.zh, item.arrow) for item in PLACES})


def _names(table: dict[object, tuple[str, ...]]) -> dict[str, object]:
    return {name.replace(_SIGN, ""): item for item, names in table.items() for name in names}
