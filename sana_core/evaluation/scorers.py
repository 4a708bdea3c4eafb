"""Scorers: what gives each picture of a prompt a number, higher for the better one.

A scorer is a callable `scorer(pictures, prompts) -> scores` of equally long lists. It gets all pictures of a prompt at
once, so that one that compares them with each other, as the tournament of official Sana's inference-time scaling, fits
too.

It may have a method `check(prompts, size)`, which is asked before pictures of these prompts are drawn and raises
ValueError for what it could not score. The size is (width, height), or None where it is not known yet.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from .clip import ClipScorer
from .nano import NanoScorer

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]

SCORER_NAMES = "nano, clip:FOLDER or module:function"


def load_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """The scorer of a name.

    name: "nano" judges sana-nano's pictures; "clip:FOLDER" is the CLIP score, from a folder that transformers'
        CLIPModel and CLIPProcessor were saved in; "module:function" is any callable that Python can import.
    device: where the CLIP model runs.

    Raises ValueError for a name that is none of these, FileNotFoundError for a folder without a CLIP model.
    """
    kind, colon, rest = name.partition(":")
    if name == "nano":
        return NanoScorer()
    if kind == "clip" and rest:
        return ClipScorer.from_folder(Path(rest), device)
    if not colon or not kind or not rest:
        raise ValueError(f"there is no scorer {name!r}: expected {SCORER_NAMES}")
    return _import_scorer(kind, rest)


def check_before_scoring(scorer: Scorer, prompts: Sequence[str], size: tuple[int, int] | None) -> None:
    """Ask the scorer's `check`, where it has one. Raises what that raises."""
    check = getattr(scorer, "check", None)
    if check:
        check(prompts, size)


def score_pictures(
    scorer: Scorer, pictures: Sequence[Image.Image], prompts: Sequence[str], names: Sequence[str] | None = None
) -> list[float]:
    """The scores, checked: one finite number a picture.

    names: what errors call the pictures; without them they are numbered.

    Raises ValueError that says what came instead.
    """
    names = names or [f"picture {index}" for index in range(len(pictures))]
    scores = [float(score) for score in scorer(pictures, prompts)]
    if len(scores) != len(pictures):
        raise ValueError(
            f"the scorer gave {len(scores)} scores for {len(pictures)} pictures ({', '.join(names)}): expected one each"
        )
    for name, score in zip(names, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the scorer gave {score} for {name}: expected a finite number")
    return scores


def _import_scorer(module: str, function: str) -> Scorer:
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the scorer {module}:{function} could not be imported: {error}") from error
    if not callable(scorer):
        raise ValueError(f"the scorer {module}:{function} is a {type(scorer).__name__}: expected a function")
    return scorer
