"""Pictures of a prompt file's entries, shared among processes; those that are already there are left alone."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ..pictures import METADATA_KEY
from ..prompts import PromptEntry, PromptFile, read_prompts
from ..resolution import Size
from .best_of import as_asked
from .ranks import gather, own_rank

logger = logging.getLogger(__name__)

DEFAULT_SEED = 0  # not another one each time: a second run must find the pictures of the first


@dataclass
class Outcome:
    """What became of a share of the entries."""

    drawn: int = 0
    there: int = 0
    failed: list[str] = field(default_factory=list)  # where they are in the file

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.drawn + other.drawn, self.there + other.there, self.failed + other.failed)

    def __str__(self) -> str:
        places = ", ".join(sorted(self.failed, key=lambda place: (len(place), place)))  # line 9 before line 10
        failed = f"{len(self.failed)} failed" + (f" ({places})" if places else "")
        return f"{self.drawn} drawn, {self.there} already there, {failed}"


def add_file_options(group) -> None:
    """Declare the options that `read_prompt_file` reads, of which one excludes the other."""
    suffixes = "each may end in --ar height:width, for the nearest size of the official table, or --hw height:width"
    again = "a second run draws what is missing or changed"
    group.add_argument("--txt-file", type=Path, metavar="TXT", help=f"a prompt a line; {suffixes}; {again}")
    group.add_argument("--json-file", type=Path, metavar="JSON", help="a list of prompts, or prompts by name; the same")


def read_prompt_file(args: argparse.Namespace) -> PromptFile:
    """The prompts asked for; what is wrong with some of them is logged, once for all processes."""
    if args.output.suffix.lower() == ".png":
        raise ValueError(f"the prompts of a file do not fit in {args.output}: name a folder")
    path, expected = (args.txt_file, ".txt") if args.txt_file else (args.json_file, ".json")
    if path.suffix.lower() != expected:
        raise ValueError(f"--{expected[1:]}-file wants a {expected} file, not {path}")
    prompts = read_prompts(path)
    if own_rank().index == 0:
        for note in prompts.notes:
            logger.warning("%s, %s", path, note)
        for fault in prompts.faults:
            logger.error("%s, %s", path, fault)
    return prompts


def draw_prompt_file(prompts: PromptFile, args: argparse.Namespace, drawing) -> None:
    """Draw this process's share of the entries into the folder, and tell what became of all.

    drawing: has `pipe`, `draw(prompt, args, path)` and `notes(prompt, args, size)`, where args are the command's
        options with those of the entry in their place.
    Raises ValueError at the end if some could not be drawn; OSError at once, since a full disk is full for all.
    """
    rank = own_rank()
    args.output.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(failed=[fault.where for fault in prompts.faults] if rank.index == 0 else [])
    for entry in rank.share(prompts.entries):
        try:
            drawn = _draw_entry(entry, args, drawing)
        except (ValueError, FloatingPointError, RuntimeError, MemoryError) as error:  # RuntimeError: out of memory
            logger.error("%s, %s: %s", prompts.path, entry.where, error, exc_info=args.verbose)
            outcome.failed.append(entry.where)
            torch.cuda.empty_cache()  # what a larger picture left behind could be what the next one lacks
        else:
            outcome.drawn += drawn
            outcome.there += not drawn
    outcomes = gather(rank, outcome)
    if rank.index == 0 or len(outcomes) == 1:
        _tell(sum(outcomes[1:], outcomes[0]))


def _draw_entry(entry: PromptEntry, args: argparse.Namespace, drawing) -> bool:
    """Whether the picture had to be drawn."""
    options = _options(entry, args, drawing.pipe)
    path = args.output / f"{entry.name}.png"
    if _is_there(path, drawing.notes(entry.prompt, options, (options.width, options.height))):
        return False
    try:
        drawing.draw(entry.prompt, options, path)
    except OSError as error:
        raise OSError(f"{error}. Older files are whole; the same command goes on from there") from error
    return True


def _options(entry: PromptEntry, args: argparse.Namespace, pipe) -> argparse.Namespace:
    """The command's options, with the entry's own and the defaults of both in their place."""
    side = pipe.transformer.config.image_size
    size = entry.size(side, Size(args.height or side, args.width or side))
    seed = next(value for value in (entry.seed, args.seed, DEFAULT_SEED) if value is not None)
    negative = args.negative_prompt if entry.negative_prompt is None else entry.negative_prompt
    own = {"height": size.height, "width": size.width, "seed": seed, "negative_prompt": negative}
    return argparse.Namespace(**vars(args) | own)


def _is_there(path: Path, notes: dict) -> bool:
    """Whether a file holds the whole of a picture that was drawn with these very settings."""
    try:
        with Image.open(path) as picture:
            return as_asked(json.loads(picture.text[METADATA_KEY])) == json.loads(json.dumps(notes))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, AttributeError) as error:  # no picture, half of one, or none of ours
        logger.warning("%s is drawn again: it is no picture of this command (%s)", path, error)
        return False


def _tell(outcome: Outcome) -> None:
    if outcome.failed:
        raise ValueError(f"{outcome}. The same command tries the failed ones again")
    sys.stderr.write(f"{outcome}\n")
