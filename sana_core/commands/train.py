"""`train`: the data set's options, and `--check`, which looks at the data set before anything is trained on it."""

import argparse
import sys
from pathlib import Path

from ..checkpoint import load_tokenizer
from ..resolution import ASPECT_RATIOS
from ..training.dataset import Dataset, read_dataset
from ..training.report import report
from .models import NANO_FILES


def add_parser(commands) -> None:
    """Declare `train` among the commands."""
    parser = commands.add_parser(
        "train",
        help="check the pictures and captions to train on",
        description="Read a data set as training does and say what it holds: buckets, problems, lengths of captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_options(parser)
    add = parser.add_argument
    add("--check", action="store_true", required=True, help="decode every picture and report; nothing is trained")
    add("--text-encoder", type=Path, help="Gemma-2, whose tokenizer counts; the default is sana-nano's")
    add("--verbose", action="store_true", help="say what was loaded, and why so")
    parser.set_defaults(run=check)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `load_dataset` reads."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with pictures and captions, or one .tar")
    add("--resolution", type=int, choices=list(ASPECT_RATIOS), required=True, help="table of aspect buckets, in pixels")
    add(
        "--missing-captions",
        default="skip",
        metavar="skip|error|empty|filename|text:CAPTION",
        help="what becomes of pictures without a caption",
    )
    add(
        "--min-score",
        type=float,
        default=0.0,
        help="leave out pictures whose captions all have a CLIP score below it",
    )


def load_dataset(args: argparse.Namespace, *, decode: bool = False) -> Dataset:
    """The data set that the options name; `decode` looks at all of every picture."""
    return read_dataset(
        args.data,
        args.resolution,
        missing_captions=args.missing_captions,
        min_score=args.min_score,
        decode=decode,
    )


def check(args: argparse.Namespace) -> None:
    """Print the report on the data set. Raises DatasetError if nothing in it is usable."""
    tokenizer = load_tokenizer(args.text_encoder or NANO_FILES["text_encoder"])
    sys.stdout.write(f"{report(load_dataset(args, decode=True), tokenizer)}\n")
