"""The command line: `python -m sana_core COMMAND`, each with --help."""

import argparse
import logging
import sys

import torch

from .commands import convert, download, evaluate, generate, grid, train
from .commands.options import CommandParser
from .processor import limit_threads

COMMANDS = {
    "generate": generate,
    "train": train,
    "grid": grid,
    "evaluate": evaluate,
    "convert": convert,
    "download": download,
}
INTERRUPTED = 128 + 2  # the exit status that shells give to Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can put right is one line on stderr, without traceback."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    limit_threads()
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m sana_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
