"""Results of the training benchmark as text: a line for the log, and README.md's tables."""

from pathlib import Path

from benchmarks.contest import OURS
from benchmarks.report import newest, number, put_between, versions

START, END = "<!-- training: written by training.py -->", "<!-- end of training -->"
COLUMNS = (
    "Training", "By", "Images/s", "Ours / diffusers'", "ms", "10 to 90 %", "MB: weights + optimizer + work",
    "Gradients off by",
)  # fmt: skip
MEMORY_COLUMNS = ("Training", "Card", "Weights", "Optimizer", "EMA", "Work", "Peak", "Fits")


def ratio(row: dict) -> float | None:
    """How many times diffusers' images a second ours trains on; None where there are no times."""
    if not row["contestants"]:
        return None
    ours, theirs = (entry["images_per_second"] for entry in row["contestants"])
    return ours / theirs


def reason(row: dict) -> str:
    """Why a row has no times."""
    if row["failure"]:
        return f"not measured: {row['failure']}"
    found = row["parity"]
    return f"parity failed: {found['value']:.1e} at {found['furthest']}, at most {found['limit']:.1e} allowed"


def summary(row: dict) -> str:
    """One line about a row."""
    if not row["contestants"]:
        return f"{row['name']}: NOT TIMED, {reason(row)}"
    speed = number(row["contestants"][0]["images_per_second"])
    off = f"gradients off by {row['parity']['value']:.1e}"
    return f"{row['name']}: {speed} images/s, {ratio(row):.2f} times diffusers', {off}"


def table(rows: list[dict]) -> str:
    """Markdown, a line for each side of each row."""
    lines = [_line(*COLUMNS), f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        if not row["contestants"]:
            lines.append(_line(row["name"], "", reason(row), *[""] * (len(COLUMNS) - 3)))
        for index, entry in enumerate(row["contestants"]):
            lines.append(_line("" if index else row["name"], *_cells(row, entry)))
    return "\n".join(lines)


def _cells(row: dict, entry: dict) -> tuple[str, ...]:
    ours = entry["name"] == OURS
    memory = " + ".join(f"{entry['memory'][part] / 1e6:,.0f}" for part in ("weights", "optimizer", "work"))
    return (
        f"**{OURS}**" if ours else entry["name"],
        number(entry["images_per_second"]),
        f"{ratio(row):.2f}" if ours else "",
        number(entry["median_ms"]),
        f"{number(entry['p10_ms'])} to {number(entry['p90_ms'])}",
        memory,
        f"{row['parity']['value']:.1e} of {row['parity']['limit']:.1e}" if ours else "",
    )


def memory_summary(row: dict) -> str:
    """One line about a preset's memory."""
    if row["failure"]:
        return f"{row['name']}: NO MEMORY FIGURE, {row['failure']}"
    verdict = "fits" if row["fits"] else "does not fit"
    return f"{row['name']}: {row['peak'] / 1e9:.1f} GB, {verdict} {row['preset']}, {row['how']}"


def memory_table(rows: list[dict]) -> str:
    """Markdown, a line for each way to train; GB."""
    lines = [_line(*MEMORY_COLUMNS), f"|{' --- |' * len(MEMORY_COLUMNS)}"]
    for row in rows:
        card = f"{row['preset'].removesuffix('gb')} GB"
        if row["failure"]:
            lines.append(_line(row["name"], card, f"not {row['how']}: {row['failure']}", *[""] * 5))
            continue
        parts = (f"{row[part] / 1e9:.1f}" for part in ("weights", "optimizer", "average", "work", "peak"))
        lines.append(_line(row["name"], card, *parts, "yes" if row["fits"] else "**no**"))
    return "\n".join(lines)


def section(results: dict) -> str:
    """A device's part of README.md."""
    machine = results["machine"]
    software = versions(machine, ("torch", "cuda", "diffusers", "peft", "python"))
    facts = f"{machine['threads']} threads; {software}; commit {machine['commit']}."
    parts = [f"### {machine['device']}, {machine['dtype']}, {results['date']}", facts]
    if results["rows"]:
        loads = [row["load_average"][0] for row in results["rows"]]
        parts[-1] += f" The machine's load was {min(loads):.1f} to {max(loads):.1f}."
        parts.append(table(results["rows"]))
    if results["left_out"]:
        parts.append(f"Left out, as the time was up: {'; '.join(results['left_out'])}.")
    if results["memory"]:
        how = results["memory"][0]["how"]
        parts += [f"Memory by preset, in GB, {how}:", memory_table(results["memory"])]
    return "\n\n".join(parts)


def update_readme(readme: Path, folder: Path) -> None:
    """Put the newest results between README.md's markers. Raises ValueError where these are missing."""
    put_between(readme, START, END, [section(results) for _, results in newest(folder, training=True)])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
