"""`evaluate`: numbers on pictures: scores against their prompts, FID against others, sana-nano's own."""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..evaluation import frechet_distance, load_scorer, score_pictures
from ..evaluation.distance import INSTALL, WEIGHTS_URL
from ..evaluation.nano import score_held_out
from ..evaluation.scorers import SCORER_NAMES, Scorer, check_before_scoring
from ..pictures import list_pictures, open_picture, read_metadata
from .models import add_model_options, load_pipeline, model_files

SHARE = 16  # pictures that are in memory at once, or those of one prompt where they are more


def add_parser(commands) -> None:
    """Declare `evaluate` among the commands."""
    parser = commands.add_parser(
        "evaluate",
        help="score pictures",
        description="Score pictures: against the prompts that `generate` wrote into them (--scorer), against a folder "
        "of reference pictures (--reference), or by drawing what sana-nano has never seen (--nano).",
    )
    add = parser.add_argument
    add("--images", type=Path, metavar="FOLDER", help="the pictures")
    add(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"the mean of a score over --images: {SCORER_NAMES}; repeat the option for more",
    )
    add("--reference", type=Path, metavar="FOLDER", help=f"FID of --images against these; needs {INSTALL}")
    add("--inception", type=Path, metavar="FILE", help=f"the network of FID, downloaded from {WEIGHTS_URL}")
    add("--nano", type=int, metavar="N", help="draw N of 500 held-out combinations in each language and judge them")
    add("--output", type=Path, metavar="JSON", help="also write the figures here, and each picture's scores")
    add_model_options(parser)
    add("--verbose", action="store_true", help="say what was loaded, and why so")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """A table on stdout, the same as JSON in --output."""
    _check(args)
    report = {}
    if args.images:
        paths = list_pictures(args.images)
        report |= {"images": str(args.images), "count": len(paths), **_scores(args, paths), **_distance(args, paths)}
    if args.nano is not None:
        scores = score_held_out(load_pipeline(args, model_files(args)), args.nano)
        report["nano"] = {"count": args.nano} | {name: dataclasses.asdict(found) for name, found in scores.items()}
    sys.stdout.write(_table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> None:
    if not args.scorer and args.reference is None and args.nano is None:
        raise ValueError("nothing to evaluate: give --images with --scorer or --reference, or --nano")
    if args.images is None and (args.scorer or args.reference):
        raise ValueError("--scorer and --reference are about pictures: name their folder with --images")
    if args.images and not args.scorer and args.reference is None:
        raise ValueError("--images alone says not what to evaluate: add --scorer, --reference or both")
    if (args.reference is None) != (args.inception is None):
        raise ValueError(
            f"--reference and --inception belong together. Download Inception's weights from {WEIGHTS_URL}"
        )


def _scores(args: argparse.Namespace, paths: list[Path]) -> dict:
    if not args.scorer:
        return {}
    prompts = {path: _prompt(path) for path in paths}
    found = {}
    for name in args.scorer:
        scorer = load_scorer(name, _device(args))
        scores = {path: score for share in _shares(prompts) for path, score in _score(scorer, share, prompts)}
        pictures = {path.name: scores[path] for path in paths}
        found[name] = {"mean": statistics.fmean(scores.values()), "pictures": pictures}
    return {"scores": found}


def _shares(prompts: dict[Path, str]) -> Iterator[list[Path]]:
    """The pictures in shares of SHARE or more, none of which parts pictures of one prompt."""
    by_prompt = {}
    for path, prompt in prompts.items():
        by_prompt.setdefault(prompt, []).append(path)
    share = []
    for paths in by_prompt.values():
        share += paths
        if len(share) >= SHARE:
            yield share
            share = []
    if share:
        yield share


def _score(scorer: Scorer, paths: list[Path], prompts: dict[Path, str]) -> Iterator[tuple[Path, float]]:
    pictures = [open_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        try:
            check_before_scoring(scorer, [prompts[path]], picture.size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    scores = score_pictures(scorer, pictures, [prompts[path] for path in paths], [str(path) for path in paths])
    return zip(paths, scores, strict=True)


def _distance(args: argparse.Namespace, paths: list[Path]) -> dict:
    if args.reference is None:
        return {}
    fid = frechet_distance(paths, list_pictures(args.reference), args.inception, _device(args))
    return {"reference": str(args.reference), "fid": fid}


def _prompt(path: Path) -> str:
    prompt = read_metadata(path).get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"{path} is no picture of one prompt (a sheet of `grid` is none): move it out of the folder")
    return prompt


def _device(args: argparse.Namespace) -> torch.device:
    return args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _table(report: dict) -> str:
    rows = [(name, f"{found['mean']:.4f}") for name, found in report.get("scores", {}).items()]
    if "fid" in report:
        rows.append(("fid", f"{report['fid']:.4f}"))
    for language, scores in report.get("nano", {}).items():
        if language != "count":
            rows += [(f"nano {language} {part}", f"{share:.1%}") for part, share in scores.items()]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {figure:>9}\n" for name, figure in rows)
