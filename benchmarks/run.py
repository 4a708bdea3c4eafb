"""Our pack and diffusers side by side: the same weights, inputs and noise levels, in one process and in turns.

    python benchmarks/run.py                     all rows of the device: a GPU if there is one, else the CPU
    python benchmarks/run.py --rows "1024 px"    those whose name has it; earlier results of the day are kept
    python benchmarks/run.py --quick             two rounds of sana-nano, to see that it works; README.md stays

It writes results/DATE-DEVICE.json and makes the table and the plot of README.md from it. Exit status 1: a result of
ours is wrong, and no speed of it is shown.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, this folder would be there instead

import diffusers
import torch
import transformers

from benchmarks import report
from benchmarks.contest import OURS, Row, hold
from benchmarks.networks import Place
from benchmarks.rows import cpu_rows, gpu_rows, quick_rows

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICK_RESULTS = HERE.parent / "runs" / "benchmark"


def place_of(device: torch.device) -> Place:
    """float32 on a CPU, where narrower types are slower, else bfloat16."""
    return Place(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def describe_machine(place: Place) -> dict:
    """What the figures depend on."""
    on_gpu = place.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place.device) if on_gpu else _processor(),
        "kind": place.device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(place.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "gcc": _ask("gcc", "-dumpfullversion"),  # compiles kernels of a CPU
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "commit": _commit(),
    }


def _processor() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _commit() -> str:
    """Of the code; results and README.md, which a run writes, do not count as changes."""
    commit = _ask("git", "-C", str(HERE), "rev-parse", "--short", "HEAD")
    changed = _ask("git", "-C", str(HERE.parent), "status", "--porcelain", "sana_core", "benchmarks/*.py")
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def clocks() -> str | None:
    """The GPU's clocks, load and driver, as the driver tells them."""
    query = "clocks.sm,clocks.mem,utilization.gpu,driver_version"
    return _ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _ask(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def results_path(folder: Path, machine: dict, date: str) -> Path:
    """DATE-DEVICE.json, in letters that every file system has."""
    return folder / f"{date}-{re.sub(r'[^A-Za-z0-9]+', '-', machine['device']).strip('-')}.json"


def earlier_rows(path: Path, machine: dict, kind: str = "rows") -> list[dict]:
    """Rows of an earlier run of the day, if nothing that figures depend on has changed."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return content[kind] if content["machine"] == machine else []


def run(rows: Sequence[Row], place: Place, folder: Path, minutes: float | None = None) -> dict:
    """Measure the rows and write each as soon as it is known; returns what the file has.

    minutes: after so many no further row is begun, and those that are left out are named.
    """
    machine, date, start = describe_machine(place), datetime.date.today().isoformat(), time.monotonic()
    path = results_path(folder, machine, date)
    measured = {row["name"]: row for row in earlier_rows(path, machine)}
    left_out = []
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            left_out.append(row.name)
            continue
        measured[row.name] = hold(row, place.device) | {"load_average": os.getloadavg(), "clocks": clocks()}
        logger.info("%s", report.summary(measured[row.name]))
        write(path, _results(date, machine, left_out, measured))
    if left_out:
        logger.warning("%d rows left out, as the time was up: %s", len(left_out), "; ".join(left_out))
    results = _results(date, machine, left_out, measured)
    write(path, results)
    return results


def _results(date: str, machine: dict, left_out: list[str], measured: dict[str, dict]) -> dict:
    missing = [name for name in left_out if name not in measured]
    return {"date": date, "machine": machine, "left_out": missing, "rows": list(measured.values())}


def write(path: Path, results: dict) -> None:
    """The results as JSON."""
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def select_rows(place: Place, quick: bool, pattern: str) -> list[Row]:
    """The device's rows whose name has the pattern, a regular expression."""
    if quick:
        rows = [replace(row, rounds=2) for row in quick_rows(place)]
    else:
        rows = gpu_rows(place) if place.device.type == "cuda" else cpu_rows(place)
    return [row for row in rows if re.search(pattern, row.name, re.IGNORECASE)]


def main() -> int:
    """Run the benchmark as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--rows", default="", metavar="PATTERN", help="only rows whose name has this expression")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often to time each contestant; default: the row's")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: the cores")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no row after that")
    parser.add_argument("--quick", action="store_true", help="two rounds of sana-nano, written to runs/benchmark")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    place = place_of(torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    rows = select_rows(place, args.quick, args.rows)
    if not rows:
        parser.error(f"no row's name has {args.rows!r}")
    if args.rounds is not None:
        if args.rounds < 1:
            parser.error(f"--rounds is {args.rounds}, expected at least 1")
        rows = [replace(row, rounds=args.rounds) for row in rows]
    results = run(rows, place, QUICK_RESULTS if args.quick else RESULTS, args.minutes)
    sys.stdout.write(report.table(results["rows"]) + "\n")
    if not args.quick:
        report.update_readme(HERE / "README.md", RESULTS)
    return int(not all(is_right(row) for row in results["rows"]))


def is_right(row: dict) -> bool:
    """Whether there are results of ours, and all agree with diffusers'."""
    ours = [entry["passed"] for entry in row["contestants"] if entry["name"].startswith(OURS)]
    return bool(ours) and all(ours)


if __name__ == "__main__":
    sys.exit(main())
