"""`generate --best-of N`: draw with several seeds and keep the picture that a scorer likes best."""

import argparse
import logging
from collections.abc import Callable

from PIL import Image

from ..evaluation import best_of, load_scorer
from ..evaluation.scorers import SCORER_NAMES
from ..pipeline import SanaPipeline

logger = logging.getLogger(__name__)

Drawer = Callable[..., tuple[Image.Image, dict]]


def add_best_of_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `load_drawer` reads."""
    add = parser.add_argument
    add("--best-of", type=int, metavar="N", help="draw N pictures from --seed on and keep the one that --scorer picks")
    add("--scorer", metavar="NAME", help=f"what picks the best: {SCORER_NAMES}, the last being Python of your own")


def asked_choice(args: argparse.Namespace) -> dict:
    """What the options say of the choice, for a picture's metadata."""
    return {} if args.best_of is None else {"best_of": {"scorer": args.scorer, "count": args.best_of}}


def as_asked(notes: dict) -> dict:
    """A written picture's metadata as they were before the choice: with the first seed, and without the scores."""
    if "best_of" not in notes:
        return notes
    scores = notes["best_of"]["scores"]
    choice = {"scorer": notes["best_of"]["scorer"], "count": len(scores)}
    return notes | {"seed": int(next(iter(scores))), "best_of": choice}


def load_drawer(args: argparse.Namespace, pipe: SanaPipeline) -> Drawer:
    """What draws a prompt with the pipeline's settings: gives the picture, and what its metadata says of the choice.

    Raises ValueError where only one of the two options is given.
    """
    if (args.best_of is None) != (args.scorer is None):
        raise ValueError("--best-of and --scorer belong together: how many to draw, and what picks the best")
    if args.best_of is None:
        return lambda prompt, **settings: (pipe(prompt, **settings)[0], {})
    scorer = load_scorer(args.scorer, pipe.device)
    own = pipe.transformer.config.image_size

    def draw(prompt: str, *, seed: int, **settings) -> tuple[Image.Image, dict]:
        sides = {side: own for side in ("height", "width") if settings[side] is None}  # for the scorer to check
        best = best_of(pipe, prompt, args.best_of, scorer, seed=seed, **settings | sides)
        logger.info("seed %d is the best of %d: %.4g", best.seed, args.best_of, best.scores[best.seed])
        return best.picture, {"seed": best.seed, "best_of": {"scorer": args.scorer, "scores": best.scores}}

    return draw
