"""Score pictures against the scenes that they were asked to show, without a neural network.

The background is the median colour of the picture's border. What differs from it is compared with every subject's
glyph at every size and position (a matched filter in a perceptual colour space, coarse and then fine): the glyph that
explains most of the difference is the subject, and where it does so is the place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .scenes import (
    BACKGROUNDS,
    PLACES,
    SIDE,
    SIZES,
    SUBJECTS,
    Background,
    Place,
    Scene,
    Subject,
    draw,
)

BORDER = 8  # pixels of the frame that the background is read from; a subject covers at most an eighth of it
COARSE, FINE = 8, 4  # pixels a side of the cells in which pictures and glyphs are compared
WINDOW = 144  # pixels a side of the square in which a glyph is looked for: the largest and a margin
REACH = 80  # pixels from the middle of the picture that a subject's centre is looked for: the places are at 64
FINE_REACH = 8  # pixels around the coarse position that the fine search covers
FINE_SIZES = SIZES[::2]
COARSE_SIZES = SIZES[::4]
FAINT = 2.0  # root mean square CIELAB difference from the background below which a picture is empty; scenes reach 4.6


@dataclass(frozen=True)
class Guess:
    """What a picture shows. Subject and place are None where nothing stands out from the background."""

    subject: Subject | None
    background: Background
    place: Place | None
    likeness: (
        float  # cosine between the picture's and the glyph's difference from the background; 1 is the glyph itself
    )


@dataclass(frozen=True)
class Scores:
    """Fractions of the pictures that show the right background, place and subject."""

    background: float
    place: float
    subject: float

    def __str__(self) -> str:
        return f"background {self.background:.1%}, place {self.place:.1%}, subject {self.subject:.1%}"


_LINEAR = np.where(
    np.arange(256) <= 0.04045 * 255, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_OPPONENTS = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]])


def cielab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB colours 0..255 [..., 3], as float32 [..., 3]: L in 0..100, a and b in about -100..100."""
    linear = np.interp(rgb, np.arange(256), _LINEAR)
    xyz = linear @ (_XYZ / _XYZ.sum(axis=1, keepdims=True)).T
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return (root @ _OPPONENTS.T - [16, 0, 0]).astype(np.float32)


def _border_colour(picture: np.ndarray) -> np.ndarray:
    """Median sRGB colour [3] of the picture's frame."""
    inner = slice(BORDER, -BORDER)
    frame = (picture[:BORDER], picture[-BORDER:], picture[inner, :BORDER], picture[inner, -BORDER:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in frame]), axis=0)


def _nearest_background(rgb: np.ndarray) -> Background:
    distance = np.linalg.norm(_PALETTE - cielab(rgb), axis=1)
    return BACKGROUNDS[int(distance.argmin())]


_PALETTE = cielab(np.array([background.rgb for background in BACKGROUNDS]))


def _difference(picture: np.ndarray, background: np.ndarray, cell: int) -> np.ndarray:
    """CIELAB difference of the picture's cells from a background colour [3]: [height / cell, width / cell, 3]."""
    height, width = (side // cell for side in picture.shape[:2])
    cells = picture.reshape(height, cell, width, cell, 3).mean(axis=(1, 3), dtype=np.float32)
    return cielab(cells) - cielab(background)


@cache
def _templates(subjects: tuple[Subject, ...], background: Background, cell: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Every subject at every size on a background, as differences of unit norm [subjects * sizes, window]."""
    middle = next(place for place in PLACES if place.name == "center")
    margin = (SIDE - WINDOW) // 2
    rows = []
    for subject in subjects:
        for size in sizes:
            window = draw(Scene(subject, background, middle, size))[margin:-margin, margin:-margin]
            row = _difference(window, np.array(background.rgb), cell).ravel()
            rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def _search(
    picture: np.ndarray,
    subjects: tuple[Subject, ...],
    colour: np.ndarray,
    cell: int,
    sizes: tuple[int, ...],
    centre: tuple[int, int],
    reach: int,
) -> tuple[Subject, tuple[int, int], float]:
    """The best subject, its centre (x, y) in pixels, and its likeness, among centres within `reach` of one."""
    difference = _difference(picture, colour, cell)
    energy = np.linalg.norm(difference)
    margin = WINDOW // 2
    padded = np.pad(difference, ((margin // cell,) * 2, (margin // cell,) * 2, (0, 0)))
    xs, ys = (range(max(middle - reach, 0), min(middle + reach, SIDE) + 1, cell) for middle in centre)
    width = WINDOW // cell
    windows = np.stack([padded[y // cell :, x // cell :][:width, :width].ravel() for y in ys for x in xs])
    match = windows @ _templates(subjects, _nearest_background(colour), cell, sizes).T
    position, template = np.unravel_index(match.argmax(), match.shape)
    row, column = divmod(int(position), len(xs))
    likeness = float(match[position, template] / energy)
    return subjects[template // len(sizes)], (xs[column], ys[row]), likeness


def score(picture: np.ndarray, subjects: tuple[Subject, ...] = SUBJECTS) -> Guess:
    """Say what a picture shows.

    Args:
        picture: uint8 [256, 256, 3], RGB.
        subjects: what it may show.

    Raises ValueError for any other shape or type.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"A picture to score is uint8 of shape ({SIDE}, {SIDE}, 3); this one is {picture.dtype} {picture.shape}."
        )
    colour = _border_colour(picture)
    background = _nearest_background(colour)
    if np.sqrt(np.square(_difference(picture, colour, COARSE)).sum(axis=-1).mean()) < FAINT:
        return Guess(None, background, None, 0.0)
    middle = (SIDE // 2, SIDE // 2)
    _, centre, _ = _search(picture, subjects, colour, COARSE, COARSE_SIZES, middle, REACH)
    subject, (x, y), likeness = _search(picture, subjects, colour, FINE, FINE_SIZES, centre, FINE_REACH)
    place = min(PLACES, key=lambda place: (place.x - x) ** 2 + (place.y - y) ** 2)
    return Guess(subject, background, place, likeness)


def compare(guesses: Iterable[Guess], scenes: Iterable[Scene]) -> Scores:
    """Fractions of the guesses that name what their scene asks for. Raises ValueError for unequal counts or none."""
    guesses, scenes = list(guesses), list(scenes)
    if len(guesses) != len(scenes) or not guesses:
        raise ValueError(f"As many pictures as scenes are needed: found {len(guesses)} pictures, {len(scenes)} scenes.")
    hits = [
        (guess.background == scene.background, guess.place == scene.place, guess.subject == scene.subject)
        for guess, scene in zip(guesses, scenes, strict=True)
    ]
    return Scores(*(float(fraction) for fraction in np.mean(hits, axis=0)))


def evaluate(
    pictures: Iterable[np.ndarray], scenes: Iterable[Scene], subjects: tuple[Subject, ...] = SUBJECTS
) -> Scores:
    """Score pictures (uint8 [256, 256, 3] each, or one array [N, 256, 256, 3]) against what they should show.

    subjects: what they may show.
    """
    return compare((score(picture, subjects) for picture in pictures), scenes)
