"""Score a folder of pictures against the scenes that their names say, and draw them all on one sheet.

    python -m scripts.nano.evaluate --pictures FOLDER

scores the PNG files of a folder, each named after what it should show: `panda-red-left.png`, `ice cream-blue-top-2.png`
(`picture_name` makes such names). `sana_core.evaluation.judge` says how.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sana_core.evaluation.judge import Guess, Scores, compare, score
from sana_core.evaluation.scenes import BACKGROUNDS, PLACES, SIDE, SIZES, SUBJECTS, Scene
from sana_core.lettering import wrap_text, write_line

logger = logging.getLogger(__name__)

LETTERS = 16  # pixels, of a sheet's captions


def picture_name(scene: Scene, number: int | None = None) -> str:
    """File name from which the command line knows what the picture should show."""
    words = [scene.subject.name, scene.background.name, scene.place.name]
    return "-".join(words if number is None else [*words, str(number)]) + ".png"


def _scene_of(path: Path) -> Scene:
    """What the file's name asks for; the size is not in the name and not scored."""
    parts = []
    words = path.stem.split("-")
    for kind, items in (("subject", SUBJECTS), ("background", BACKGROUNDS), ("place", PLACES)):
        named = {item.name: item for item in items}
        word = words.pop(0) if words else ""
        if word not in named:
            raise ValueError(
                f"{path}: {word!r} is no {kind}. A picture to score is named subject-background-place[-number].png, "
                f"such as panda-red-left.png; the {kind} is one of: {', '.join(named)}."
            )
        parts.append(named[word])
    return Scene(*parts, SIZES[-1])


def read_pictures(folder: Path) -> tuple[list[np.ndarray], list[Scene], list[Path]]:
    """The PNG files of a folder in order of name: pictures uint8 [256, 256, 3], what they should show, their paths.

    Raises FileNotFoundError where there is none, and ValueError for a name or a size that is not a scene's.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"There is no PNG file in {folder}.")
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            if picture.size != (SIDE, SIDE):
                raise ValueError(f"{path} has {picture.width}x{picture.height} pixels; scenes have {SIDE}x{SIDE}.")
            pictures.append(np.asarray(picture.convert("RGB")))
    return pictures, [_scene_of(path) for path in paths], paths


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> Image.Image:
    """A grid of pictures (uint8 [256, 256, 3]), each above its caption of one line."""
    rows = -(-len(pictures) // columns)
    pitch_x, pitch_y = SIDE + 8, SIDE + 32
    sheet = Image.new("RGB", (columns * pitch_x, rows * pitch_y), "white")
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(number, columns)
        x, y = column * pitch_x + 4, row * pitch_y + 4
        sheet.paste(Image.fromarray(picture), (x, y))
        for line in wrap_text(caption, LETTERS, SIDE, 1):
            write_line(sheet, line, x, y + SIDE + 2, LETTERS)
    return sheet


def _describe(item: Guess | Scene) -> str:
    return ", ".join(part.name if part else "none" for part in (item.subject, item.background, item.place))


def main(arguments: Sequence[str] | None = None) -> Scores:
    """Score a folder of pictures; log each picture that is wrong, then the fractions that are right."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.nano.evaluate",
        description="Score pictures named subject-background-place[-number].png against what their names say.",
    )
    parser.add_argument("--pictures", type=Path, required=True, metavar="FOLDER", help="folder of 256x256 PNG files")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw all pictures and guesses on one sheet")
    options = parser.parse_args(arguments)
    pictures, scenes, paths = read_pictures(options.pictures)
    guesses = [score(picture) for picture in pictures]
    for guess, scene, path in zip(guesses, scenes, paths, strict=True):
        if _describe(guess) != _describe(scene):
            logger.info("%s shows %s (likeness %.2f)", path.name, _describe(guess), guess.likeness)
    scores = compare(guesses, scenes)
    logger.info("%d pictures: %s", len(pictures), scores)
    if options.sheet:
        contact_sheet(pictures, [_describe(guess) for guess in guesses], 8).save(options.sheet)
    return scores


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
