"""Our training step beside that of diffusers' DreamBooth LoRA recipe: the same weights, data and settings, in turns.

    python -m benchmarks.training                    all rows of the device, and what memory the presets take
    python -m benchmarks.training --measure          on a GPU: that memory measured there, and not followed
    python -m benchmarks.training --rows "nano"      those whose name has it, and no memory
    python -m benchmarks.training --quick            two rounds of sana-nano, to see that it works; README.md stays

It writes results/DATE-DEVICE-training.json and makes README.md's tables from it. Exit status 1: gradients of ours are
wrong, and no speed is shown beside them, or a preset does not fit its card.
"""

import argparse
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import peft
import torch

from benchmarks import training_memory, training_report
from benchmarks.duel import hold
from benchmarks.networks import NANO, Place
from benchmarks.report import TRAINING
from benchmarks.run import (
    HERE,
    QUICK_RESULTS,
    RESULTS,
    clocks,
    describe_machine,
    earlier_rows,
    place_of,
    results_path,
    write,
)  # fmt: skip
from benchmarks.steps import Job
from sana_core.config import TRANSFORMERS

logger = logging.getLogger(__name__)

SMALL = replace(TRANSFORMERS["Sana_600M_512px"], hidden_size=576, depth=8, num_cross_heads=8)
SMALL_NAME = "0.6B cut to half its width and 8 of 28 blocks"


def gpu_jobs() -> list[Job]:
    """The seed's sizes, the goals' first."""
    small, large = TRANSFORMERS["Sana_600M_512px"], TRANSFORMERS["Sana_1600M_1024px_BF16"]
    jobs = [
        Job("0.6B", small, 512, "lora", 32),
        Job("1.6B", large, 1024, "full", 8, recompute=True),
        Job("1.6B", large, 1024, "lora", 8),
        Job("0.6B", small, 512, "full", 32),
        Job("1.6B", large, 1024, "lora", 8, recompute=True),
        Job("1.6B", large, 1024, "full", 2),
        Job("0.6B", small, 512, "lora", 32, recompute=True),
    ]
    return [replace(job, precision="bf16") for job in jobs]


def cpu_jobs() -> list[Job]:
    """Small models: a step takes a second or a few."""
    jobs = [
        Job(SMALL_NAME, SMALL, 512, mode, 2, recompute=recompute, rounds=8)
        for mode, recompute in (("lora", False), ("full", False), ("lora", True))
    ]
    return quick_jobs(rounds=20) + jobs


def quick_jobs(rounds: int = 2) -> list[Job]:
    """One of each kind, of sana-nano's size."""
    kinds = [(mode, recompute) for recompute in (False, True) for mode in ("lora", "full")]
    return [
        Job("nano", TRANSFORMERS[NANO], 256, mode, 8, recompute=recompute, rounds=rounds) for mode, recompute in kinds
    ]


class Record:
    """The JSON of a run, written as soon as a row is known; rows of the same day, machine and code are kept."""

    def __init__(self, place: Place, folder: Path):
        machine = describe_machine(place) | {"peft": peft.__version__}
        date = datetime.date.today().isoformat()
        path = results_path(folder, machine, date)
        self.path = path.with_name(f"{path.stem}{TRAINING}.json")
        kept = {kind: earlier_rows(self.path, machine, kind) for kind in ("rows", "memory")}
        self.results = {"date": date, "machine": machine, "left_out": []} | kept
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, row: dict) -> None:
        """A row of "rows" or of "memory"; one of its name is replaced."""
        others = [one for one in self.results[kind] if one["name"] != row["name"]]
        self.results[kind] = [*others, row]
        write(self.path, self.results)


def run(jobs: Sequence[Job], plans: Sequence[training_memory.Plan], place: Place, folder: Path, *, measured: bool,
        minutes: float | None = None) -> dict:  # fmt: skip
    """Time the jobs and find the memory of the plans; returns what the file has.

    minutes: after so many nothing further is begun, and jobs that are left out are named.
    """
    record, start = Record(place, folder), time.monotonic()

    def time_is_up() -> bool:
        return minutes is not None and time.monotonic() - start > 60 * minutes

    for job in jobs:
        if time_is_up():
            record.results["left_out"].append(job.name)
            continue
        row = hold(job, place.device) | {"load_average": os.getloadavg(), "clocks": clocks()}
        record.add("rows", row)
        logger.info("%s", training_report.summary(row))
    for plan in plans:
        if not time_is_up():
            row = training_memory.row(plan, measured)
            record.add("memory", row)
            logger.info("%s", training_report.memory_summary(row))
    known = {row["name"] for row in record.results["rows"]}
    record.results["left_out"] = [name for name in record.results["left_out"] if name not in known]
    write(record.path, record.results)
    return record.results


def is_right(results: dict) -> bool:
    """Whether all rows have times, and each preset fits its card."""
    timed = all(row["contestants"] for row in results["rows"])
    return timed and not any(row.get("fits") is False and row["promised"] for row in results["memory"])


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    add("--rows", metavar="PATTERN", help="only rows whose name has this expression, and no memory")
    add("--rounds", type=int, metavar="N", help="how many steps of each side to time; default: the row's")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: the cores")
    add("--minutes", type=float, metavar="N", help="begin nothing after that")
    add("--memory", action="store_true", help="memory alone, no rows")
    add("--measure", action="store_true", help="measure memory on the GPU instead of following it")
    add("--quick", action="store_true", help="two rounds of sana-nano, written to runs/benchmark")
    return parser


def main() -> int:
    """Run the benchmark as the arguments say."""
    parser = arguments()
    args = parser.parse_args()
    for name, value in (("--rounds", args.rounds), ("--threads", args.threads)):
        if value is not None and value < 1:
            parser.error(f"{name} is {value}, expected at least 1")
    on_gpu = torch.cuda.is_available()
    if (args.measure or args.device == "cuda") and not on_gpu:
        parser.error(f"PyTorch {torch.__version__} finds no usable GPU to measure on")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    place = place_of(torch.device(args.device or ("cuda" if on_gpu else "cpu")))
    jobs = [] if args.memory else _jobs(parser, args, place)
    plans = () if args.quick or args.rows is not None else training_memory.PLANS
    folder = QUICK_RESULTS if args.quick else RESULTS
    results = run(jobs, plans, place, folder, measured=args.measure, minutes=args.minutes)
    sys.stdout.write(f"{training_report.table(results['rows'])}\n\n{training_report.memory_table(results['memory'])}\n")
    if not args.quick:
        training_report.update_readme(HERE / "README.md", RESULTS)
    return int(not is_right(results))


def _jobs(parser: argparse.ArgumentParser, args: argparse.Namespace, place: Place) -> list[Job]:
    device_jobs = gpu_jobs if place.device.type == "cuda" else cpu_jobs
    pattern = args.rows or ""
    try:
        jobs = [job for job in (quick_jobs() if args.quick else device_jobs()) if re.search(pattern, job.name, re.I)]
    except re.error as error:
        parser.error(f"--rows is {pattern!r}, which is no regular expression: {error}")
    if not jobs:
        parser.error(f"no row's name has {pattern!r}")
    return [replace(job, rounds=args.rounds or job.rounds) for job in jobs]


if __name__ == "__main__":
    sys.exit(main())
