"""`grid`: a prompt drawn over one or two lists of values, and all pictures on one labelled sheet."""

import argparse
import itertools
import secrets
import sys
from functools import partial
from pathlib import Path

from ..grid import Axis, draw_grid, split_values
from ..pictures import open_picture, write_png
from .generate import add_drawing_options, load_drawing
from .ranks import require_one_process

NO_AXIS = Axis("", ("",))
LOADED_ONCE = (  # cells with other values of these are drawn by another model, or start from another picture
    "model", "transformer", "vae", "text_encoder", "variant", "device", "dtype", "lora", "image", "mask", "best_of",
    "scorer",
)  # fmt: skip
NOT_VARIED = ("output", "verbose", "x", "y")


def add_parser(commands) -> None:
    """Declare `grid` among the commands."""
    parser = commands.add_parser(
        "grid",
        help="draw a prompt over lists of values, on one sheet",
        description="Draw a prompt with every pair of the values in --x and --y, all from the same seed, and put the "
        "pictures on one labelled sheet. Takes the options of `generate`; --x and --y vary any of them.",
    )
    axis = partial(_axis, parser)
    text = "an option of `generate` and its values; where a value holds a comma, put | between values"
    parser.add_argument("--x", type=axis, required=True, metavar="NAME=A,B,C", help=f"columns: {text}")
    parser.add_argument("--y", type=axis, metavar="NAME=A,B,C", help="rows, likewise; one row if left out")
    add_drawing_options(parser)
    parser.set_defaults(run=partial(grid, parser))


def grid(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The sheet at --output, or grid_00001.png and so on there; each picture beside it, with row and column added."""
    x, y = args.x, args.y or NO_AXIS
    require_one_process()
    if len(args.prompt or []) != 1:
        raise ValueError("a grid has one --prompt; several are values of an axis: --y 'prompt=a cat|a dog'")
    if x.name == y.name:
        raise ValueError(f"--x and --y both vary {x.name}: leave one out")
    sheet = _sheet_path(args.output)
    args.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    cells = {
        sheet.with_name(f"{sheet.stem}_{row:02d}_{column:02d}.png"): _cell(parser, args, {x.name: right, y.name: down})
        for row, down in enumerate(y.values, 1)
        for column, right in enumerate(x.values, 1)
    }
    models = {path: repr([getattr(cell, name) for name in LOADED_ONCE]) for path, cell in cells.items()}
    for _, paths in itertools.groupby(sorted(cells, key=models.get), models.get):
        _draw_with_one_model({path: cells[path] for path in paths})
    picture = draw_grid([open_picture(path) for path in cells], x.labels, y.labels)
    axes = {name: {axis.name: axis.values} for name, axis in (("x", x), ("y", y)) if axis != NO_AXIS}
    write_png(picture, sheet, {"grid": axes, "seed": args.seed})
    sys.stdout.write(f"{sheet}\n")


def _draw_with_one_model(cells: dict[Path, argparse.Namespace]) -> None:
    drawing = load_drawing(next(iter(cells.values())))
    for path, cell in cells.items():
        drawing.draw(cell.prompt[0], cell, path)


def _axis(parser: argparse.ArgumentParser, text: str) -> Axis:
    name, equals, values = text.partition("=")
    name = name.strip().lstrip("-").replace("_", "-")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=A,B,C, such as steps=10,20")
    try:
        axis = Axis(name, tuple(split_values(values)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error
    for value in axis.values:
        if not _parsed(parser, name, value):  # refused at once, not after the first pictures
            raise argparse.ArgumentTypeError(f"--{name} is not what a grid can vary: expected an option of `generate`")
    return axis


def _cell(parser: argparse.ArgumentParser, args: argparse.Namespace, values: dict[str, str]) -> argparse.Namespace:
    """The options of one picture."""
    options = vars(args)
    for name, value in values.items():
        options = options | (_parsed(parser, name, value) if name else {})
    return argparse.Namespace(**options)


def _parsed(parser: argparse.ArgumentParser, name: str, value: str) -> dict:
    """What the option makes of a value, by its own type and choices."""
    if name == "prompt":
        return {"prompt": [value]}
    required = ["--prompt=", "--x=prompt=a"]
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(required))))
    given = vars(parser.parse_args([*required, f"--{name}={value}"], unset))
    return {key: found for key, found in given.items() if found is not None and key not in ("prompt", *NOT_VARIED)}


def _sheet_path(output: Path) -> Path:
    folder = output.parent if output.suffix.lower() == ".png" else output
    folder.mkdir(parents=True, exist_ok=True)
    if folder != output:
        return output
    names = (folder / f"grid_{number:05d}.png" for number in itertools.count(1))
    return next(path for path in names if not path.exists())
