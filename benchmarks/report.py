"""Results as text: a line for the log, and README.md's tables, which say what the JSON says and nothing else."""

import json
from pathlib import Path

from benchmarks import plot
from benchmarks.contest import OURS, PEER

START, END = "<!-- results: written by run.py -->", "<!-- end of results -->"
TRAINING = "-training"  # ends the names of training.py's results
SOFTWARE = ("torch", "cuda", "diffusers", "transformers", "python", "gcc")
COLUMNS = ("Work", "By", "ms", "10 to 90 %", "diffusers' ms / ms", "MB: weights + work", "Off by", "Warm")


def speedup(row: dict, name: str) -> float | None:
    """How many times as fast as diffusers a contestant is; None where one of them has no time."""
    times = {entry["name"]: entry.get("median_ms") for entry in row["contestants"]}
    return times[PEER] / times[name] if times.get(PEER) and times.get(name) else None


def summary(row: dict) -> str:
    """One line about our result."""
    if row["failure"]:
        return f"{row['name']}: NOT MEASURED, {row['failure']}"
    ours = next(entry for entry in row["contestants"] if entry["name"] == OURS)
    if "median_ms" not in ours:
        return f"{row['name']}: NOT TIMED, {reason(ours, row['parity'])}"
    ratio = speedup(row, OURS)
    against = "diffusers was not timed" if ratio is None else f"{ratio:.2f} times as fast as diffusers"
    return f"{row['name']}: {number(ours['median_ms'])} ms, {against}, off by {ours['parity']:.1e}"


def reason(entry: dict, rule: dict) -> str:
    """Why a contestant has no time."""
    if entry["failure"]:
        return entry["failure"]
    if entry["passed"] is False:
        return f"parity failed: {entry['parity']:.1e}, at most {rule['limit']:.1e} allowed"
    return "there is nothing to compare with"


def table(rows: list[dict]) -> str:
    """Markdown, a line for each contestant of each row."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        if row["failure"]:
            lines.append(_line(row["name"], "", f"not measured: {row['failure']}"))
        for index, entry in enumerate(row["contestants"]):
            lines.append(_line("" if index else row["name"], *_cells(row, entry)))
    return "\n".join(lines)


def _cells(row: dict, entry: dict) -> tuple[str, ...]:
    name = f"**{OURS}**" if entry["name"] == OURS else entry["name"]
    if "median_ms" not in entry:
        return name, reason(entry, row["parity"])
    spread = f"{number(entry['p10_ms'])} to {number(entry['p90_ms'])}"
    ratio = speedup(row, entry["name"])
    memory = f"{_megabytes(entry['memory']['weights'])} + {_megabytes(entry['memory']['work'])}"
    parity = "" if entry["parity"] is None or not entry["parity"] else f"{entry['parity']:.1e}"
    if entry["name"] != PEER:
        parity = f"{entry['parity']:.1e} of {row['parity']['limit']:.1e}"
    against = "" if ratio is None or entry["name"] == PEER else f"{ratio:.2f}"
    return name, number(entry["median_ms"]), spread, against, memory, parity, entry["warm"]


def _line(*cells: str) -> str:
    return f"| {' | '.join([*cells, *[''] * (len(COLUMNS) - len(cells))])} |"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def versions(machine: dict, names: tuple[str, ...]) -> str:
    """Those of the named software that a machine's results tell of."""
    return ", ".join(f"{name} {machine[name] or 'none'}" for name in names if name in machine)


def section(results: dict, picture: str) -> str:
    """A device's part of README.md."""
    machine = results["machine"]
    measures = sorted({row["parity"]["measure"] for row in results["rows"] if row["parity"]})
    loads = [row["load_average"][0] for row in results["rows"]]
    parts = [
        f"## {machine['device']}, {machine['dtype']}, {results['date']}",
        f"{machine['threads']} threads; {versions(machine, SOFTWARE)}; commit {machine['commit']}. TF32 "
        f"{_switch(machine['tf32'])}, cuDNN's benchmark {_switch(machine['cudnn_benchmark'])}. The machine's load was "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        f"![How many times as fast as diffusers each row is]({picture})",
        table(results["rows"]),
        f"Off by: {' or '.join(measures)}.",
    ]
    if results["left_out"]:
        parts.append(f"Left out, as the time was up: {'; '.join(results['left_out'])}.")
    return "\n\n".join(parts)


def _switch(on: bool) -> str:
    return "on" if on else "off"


def newest(folder: Path, training: bool = False) -> list[tuple[Path, dict]]:
    """The last results of each device, devices in the order of their names."""
    found: dict[str, tuple[Path, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        of_this_kind = path.stem.endswith(TRAINING) == training and "machine" in results
        if of_this_kind and (results["rows"] or results.get("memory")):
            found[results["machine"]["device"]] = path, results
    return [found[device] for device in sorted(found)]


def update_readme(readme: Path, folder: Path) -> None:
    """Put the newest results between README.md's markers, and draw their plots beside the JSON.

    Raises ValueError where the markers are missing.
    """
    sections = []
    for path, results in newest(folder):
        picture = path.with_suffix(".svg")
        picture.write_text(plot.bars(results), encoding="utf-8")
        sections.append(section(results, picture.relative_to(readme.parent).as_posix()))
    put_between(readme, START, END, sections)


def put_between(readme: Path, start: str, end: str, sections: list[str]) -> None:
    """Replace what is between two lines of a file. Raises ValueError where it does not hold each of them once."""
    text = readme.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme} has to hold each of these lines once: {start} and {end}")
    before, after = text.split(start)[0], text.split(end)[1]
    readme.write_text("\n\n".join([before + start, *sections, end + after]), encoding="utf-8")
