"""Teaches sana-nano a subject that it never saw, by a LoRA on 20 pictures, and scores what came of it.

    python -m scripts.nano.new_subject draw runs/nano/pumpkin/pictures
    python -m sana_core train --data runs/nano/pumpkin/pictures --resolution 256 --output runs/nano/pumpkin/lora \\
        --steps 400 --batch 8 --targets attention+feed-forward --learning-rate 1e-3 --schedule cosine
    python -m scripts.nano.new_subject score runs/nano/pumpkin/lora/lora.safetensors --sheet runs/nano/pumpkin/sheet.png

Beside the 20 pictures lie 60 of other subjects that nano draws itself, with their captions (the prior preservation of
DreamBooth, arXiv:2208.12242): with the 20 alone every subject becomes the new one.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from sana_core.evaluation import scenes
from sana_core.evaluation.judge import Scores, evaluate
from sana_core.evaluation.nano import draw_scenes
from sana_core.evaluation.scenes import BACKGROUNDS, LANGUAGES, PLACES, SIZES, SUBJECTS, Scene, Subject
from sana_core.pipeline import SanaPipeline

from .evaluate import contact_sheet
from .score import load_nano

PUMPKIN = Subject("\N{JACK-O-LANTERN}", "pumpkin", "南瓜", "个")
_PAIRS = len(BACKGROUNDS) * len(PLACES)  # counting on in both tables meets each pair once
_SCENES = tuple(
    Scene(PUMPKIN, BACKGROUNDS[i % len(BACKGROUNDS)], PLACES[i % len(PLACES)], SIZES[7 * i % len(SIZES)])
    for i in range(_PAIRS)
)
TRAINED, HELD_OUT = _SCENES[: _PAIRS // 2], _SCENES[_PAIRS // 2 :]
OLD_SCENES = scenes.HELD_OUT[::5]
REHEARSED = 60  # pictures of old subjects


def draw(folder: Path, pipe: SanaPipeline) -> None:
    """Writes the pictures of the new subject, and those of old ones that nano draws, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, scene in enumerate(TRAINED):
        caption = scenes.caption(scene, LANGUAGES[number % len(LANGUAGES)], rng)
        _write(folder / f"pumpkin_{number:02}.png", Image.fromarray(scenes.draw(scene)), caption)
    old = [scenes.train_scene(rng) for _ in range(REHEARSED)]
    captions = [scenes.caption(scene, LANGUAGES[number % len(LANGUAGES)], rng) for number, scene in enumerate(old)]
    for number, (caption, picture) in enumerate(zip(captions, pipe(captions, seed=0), strict=True)):
        _write(folder / f"old_{number:02}.png", picture, caption)


def _write(path: Path, picture: Image.Image, caption: str) -> None:
    picture.save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def score(pipe: SanaPipeline, wanted: list[Scene], language: str) -> tuple[list[np.ndarray], Scores]:
    """Pictures of the scenes, and their scores where the new subject is one of those they may show."""
    pictures = draw_scenes(pipe, wanted, language)
    return pictures, evaluate(pictures, wanted, (*SUBJECTS, PUMPKIN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="draw the pictures to train on")
    drawing.add_argument("folder", type=Path)
    scoring = commands.add_parser("score", help="score the new subject, in combinations not trained on, and the old")
    scoring.add_argument("lora", type=Path)
    scoring.add_argument("--sheet", type=Path, help="PNG of the new subject's pictures")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    pipe = load_nano("cpu")
    if args.command == "draw":
        draw(args.folder, pipe)
        return
    pipe.load_lora(args.lora)
    drawn = []
    for language in LANGUAGES:
        pictures, scores = score(pipe, list(HELD_OUT), language)
        drawn += pictures
        logging.info("%s, new subject: %s", language, scores)
        logging.info("%s, old subjects: %s", language, score(pipe, list(OLD_SCENES), language)[1])
    if args.sheet:
        names = [f"{scene.background.name}, {scene.place.name}" for scene in HELD_OUT]
        contact_sheet(drawn, names * len(LANGUAGES), len(HELD_OUT) // 2).save(args.sheet)


if __name__ == "__main__":
    main()
