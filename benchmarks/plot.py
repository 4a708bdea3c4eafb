"""Results as a picture: a bar for each row, as long as we are times as fast as diffusers. Plain SVG."""

from html import escape
from math import ceil

from benchmarks.contest import OURS, PEER

COMPILED_NAME = f"{PEER}, compiled"
INK, FAINT, GRID = "#1f2933", "#6b7785", "#dfe3e8"
FASTER, SLOWER, COMPILED = "#2f7dd1", "#c9772b", "#12355b"
LABELS, BARS, VALUES = 350, 450, 90  # widths of the columns
TOP, STEP, THICKNESS, BOTTOM = 74, 27, 14, 44


def bars(results: dict) -> str:
    """The SVG of one device's results."""
    rows = [row for row in results["rows"] if row["contestants"]]
    ratios = [_ratios(row) for row in rows]
    most = max([2, *(value for each in ratios for value in each.values())])
    scale = BARS / ceil(most * 1.02)
    height = TOP + STEP * len(rows) + BOTTOM
    parts = [_frame(results, height, scale, ceil(most * 1.02))]
    for index, (row, each) in enumerate(zip(rows, ratios, strict=True)):
        parts.append(_bar(row["name"], each, TOP + STEP * index, scale))
    # Drawn last: what diffusers needs, across all bars.
    x = LABELS + scale
    parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - BOTTOM}" stroke="{INK}"/>')
    return "\n".join([*parts, "</svg>\n"])


def _ratios(row: dict) -> dict[str, float]:
    """How many times as fast as diffusers: those that have a time, but not diffusers itself."""
    times = {entry["name"]: entry["median_ms"] for entry in row["contestants"] if "median_ms" in entry}
    peer = times.pop(PEER, None)
    return {name: peer / value for name, value in times.items()} if peer else {}


def _frame(results: dict, height: int, scale: float, most: int) -> str:
    width = LABELS + BARS + VALUES
    machine = results["machine"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(16, 28, "Times as fast as diffusers", INK, "start", 'font-size="17" font-weight="600"'),
        _text(16, 48, f"{machine['device']}, {machine['dtype']}, {results['date']}", FAINT),
    ]
    for tick in range(most + 1):
        x = LABELS + scale * tick
        if tick != 1:
            parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - BOTTOM}" stroke="{GRID}"/>')
        label = "diffusers" if tick == 1 else str(tick)
        parts.append(_text(x, height - BOTTOM + 18, label, INK if tick == 1 else FAINT, "middle"))
    return "\n".join(parts)


def _bar(name: str, ratios: dict[str, float], y: float, scale: float) -> str:
    middle = y + THICKNESS / 2 + 4.5
    parts = [_text(LABELS - 10, middle, name, INK, "end")]
    ratio = ratios.get(OURS)
    if ratio is None:
        return "\n".join([*parts, _text(LABELS + 8, middle, "not timed", SLOWER)])
    length, color = scale * ratio, FASTER if ratio >= 1 else SLOWER
    parts.append(
        f'<rect x="{LABELS}" y="{y}" width="{length:.1f}" height="{THICKNESS}" rx="3" fill="{color}"><title>'
        f"{escape(name)}: {ratio:.2f}</title></rect>"
    )
    parts.append(_text(LABELS + max(length, scale) + 8, middle, f"{ratio:.2f}", INK, "start", 'font-weight="600"'))
    if (compiled := ratios.get(COMPILED_NAME)) is not None:
        top, length = y + THICKNESS + 1, scale * compiled
        parts.append(f'<rect x="{LABELS}" y="{top}" width="{length:.1f}" height="5" rx="2" fill="{COMPILED}"/>')
        end = LABELS + max(length, scale) + 8
        parts.append(_text(end, top + 7, f"{COMPILED_NAME}: {compiled:.2f}", FAINT, "start", 'font-size="10"'))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" {style}>{escape(text)}</text>'
