"""Scores the shipped sana-nano on the held-out scenes, and draws the picture of the README.

python -m scripts.nano.score --output runs/nano/score
"""

import argparse
import json
import logging
import time
from pathlib import Path

import einops
import numpy as np
import torch
from PIL import Image

from sana_core.evaluation import scenes
from sana_core.evaluation.judge import evaluate
from sana_core.evaluation.nano import draw_scenes
from sana_core.pipeline import SanaPipeline

from .autoencoder import measure
from .evaluate import contact_sheet

MODELS = Path(__file__).parents[2] / "models"
SHEET_COLUMNS, SHEET_ROWS = 6, 4
SHOWN = (  # prompts of the README's picture, three in a row
    "a panda on the left of a red background",
    "a fox in the center of a blue background",
    "a rocket on the right of a black background",
    "黄色背景右边的机器人",
    "一朵向日葵在紫色背景的中间",
    "绿色背景左边的幽灵",
    "🍓⬆️⬜",
    "🐙⏺️🟧",
    "⛄⬇️🟦",
)


def load_nano(device: str) -> SanaPipeline:
    """The shipped models in float32."""
    return SanaPipeline.from_files(
        transformer=MODELS / "diffusion_models/sana_nano.safetensors",
        vae=MODELS / "vae/dc_ae_nano.safetensors",
        text_encoder=MODELS / "text_encoders/gemma2_nano.safetensors",
        device=device,
        dtype=torch.float32,
    )


def draw_grid(pipe: SanaPipeline) -> Image.Image:
    """Pictures of `SHOWN` in rows of three."""
    pictures = [np.array(picture) for picture in pipe(SHOWN, seed=1)]
    return Image.fromarray(einops.rearrange(pictures, "(row column) h w c -> (row h) (column w) c", column=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/nano/score"), help="folder for pictures and scores")
    parser.add_argument("--count", type=int, default=len(scenes.HELD_OUT), help="how many held-out scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.output.mkdir(parents=True, exist_ok=True)

    pipe = load_nano(args.device)
    wanted = list(scenes.HELD_OUT[: args.count])
    start = time.monotonic()
    pipe("a panda on the left of a red background", seed=0)
    report = {"seconds_a_picture": time.monotonic() - start, "autoencoder": measure(pipe.vae, args.count)}
    for language in scenes.LANGUAGES:
        pictures = draw_scenes(pipe, wanted, language)
        scores = evaluate(pictures, wanted)
        report[language] = {name: getattr(scores, name) for name in ("background", "place", "subject")}
        captions = [f"{scene.subject.name}, {scene.place.name}, {scene.background.name}" for scene in wanted]
        count = SHEET_COLUMNS * SHEET_ROWS
        sheet = contact_sheet(pictures[:count], captions[:count], SHEET_COLUMNS)
        sheet.save(args.output / f"{language}.png")
        logging.info("%s: %s", language, scores)
    draw_grid(pipe).save(args.output / "sana_nano.png", optimize=True)
    (args.output / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    logging.info("Wrote %s", args.output)


if __name__ == "__main__":
    main()
