"""Files of prompts, with the suffixes that NVlabs/Sana `scripts/inference.py` reads.

A .txt file has a prompt a line; blank lines are passed over. A .json file is a list, or an object whose keys name the
pictures; an entry is the prompt itself, or an object with `prompt` and, if it has its own, `negative_prompt`, `seed`,
`width`, `height` and, in a list, `name`. Other keys are for other programs and are ignored.

A prompt may end in `--ar h:w` or `--aspect_ratio h:w`, which pick the nearest size of the official table, or in
`--hw h:w`, pixels, which goes before the other two. Heights come first, as in the official files.
"""

import codecs
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .resolution import INFERENCE_ASPECT_RATIOS, Size, nearest_size

MULTIPLE = 32  # pixels that one position of the latent stands for
MAX_SIDE = 16384
MAX_SEED = 2**64 - 1
NAME_LETTERS = 100  # of the prompt, as the official pictures are named
NAME_BYTES = 200  # file systems hold 255; the ending and a partial file's marks need room
_SUFFIX = re.compile(r"(?:^|\s)--(aspect_ratio|ar|hw)(?=[\s=]|$)")
_SUFFIX_VALUE = re.compile(r"\s*--(aspect_ratio|ar|hw)[\s=]+(\d+):(\d+)(?=\s|$)")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # device names of Windows


@dataclass(frozen=True)
class PromptEntry:
    """One picture to draw. None leaves a setting to whoever draws it."""

    name: str  # of the picture's file without the ending; no two of a prompt file are alike
    prompt: str
    where: str  # in the file: "line 3" or "entry 'cat'"
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None  # pixels, on the grid of the autoencoder
    width: int | None = None
    aspect_ratio: tuple[int, int] | None = None  # height and width, where the table is to give the size

    def size(self, base_size: int, default: Size) -> Size:
        """What to draw with a model for pictures of `base_size` pixels; `default` is for what the file leaves open.

        Raises ValueError for an aspect ratio where there is no table for that size.
        """
        if self.aspect_ratio is None:
            return Size(self.height or default.height, self.width or default.width)
        if base_size not in INFERENCE_ASPECT_RATIOS:
            tables = ", ".join(map(str, INFERENCE_ASPECT_RATIOS))
            raise ValueError(
                f"--ar picks from the official table of sizes, and there is none for a model of {base_size} px "
                f"(there are {tables}). Give the size in pixels: --hw height:width"
            )
        return nearest_size(*self.aspect_ratio, INFERENCE_ASPECT_RATIOS[base_size])


@dataclass(frozen=True)
class Remark:
    """What is to be said about a place in a prompt file."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True)
class PromptFile:
    """What was read: the entries that can be drawn, in their order, and what is wrong with the others."""

    path: Path
    entries: tuple[PromptEntry, ...]
    faults: tuple[Remark, ...]  # entries that cannot be drawn
    notes: tuple[Remark, ...]  # entries that are drawn in another way than they say


def read_prompts(path: str | Path) -> PromptFile:
    """Read a .txt or .json file. An entry with a fault is left out and told about, the others are read.

    Raises FileNotFoundError, or ValueError for a file that is neither, is no JSON, is in UTF-16, or is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no prompt file: expected .txt with a prompt a line, or .json")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8")
    try:
        return _collect(path, reader(data.removeprefix(codecs.BOM_UTF8)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def safe_name(text: str) -> str:
    """A file's name, without ending, that every system takes; readable, in whatever language the text is."""
    text = unicodedata.normalize("NFC", text)
    words = re.sub(r'[\s/\\:*?"<>|%\x00-\x1f\x7f]+', "_", text)[:NAME_LETTERS]  # % is ComfyUI's mark for variables
    name = words.encode("utf-8", "ignore")[:NAME_BYTES].decode("utf-8", "ignore").strip("._ ")
    return f"_{name}" if _RESERVED.match(name) else name


def _collect(path: Path, places: Iterable[tuple[str, Callable[[], PromptEntry]]]) -> PromptFile:
    """The entries that the places of a file give; a ValueError of one of them is a fault of the file."""
    entries, faults, notes, taken = [], [], [], set()
    for where, read in places:
        try:
            entry = read()
        except ValueError as error:
            faults.append(Remark(where, str(error)))
            continue
        for side in ("height", "width"):
            asked, given = getattr(entry, side), _on_grid(getattr(entry, side))
            if asked != given:
                notes.append(
                    Remark(where, f"the {side} of {asked} becomes {given}, the nearest multiple of {MULTIPLE}")
                )
                entry = replace(entry, **{side: given})
        entries.append(replace(entry, name=_free_name(entry.name, taken)))
    if not entries and not faults:
        raise ValueError("it holds no prompt")
    return PromptFile(path, tuple(entries), tuple(faults), tuple(notes))


def _read_lines(data: bytes) -> Iterable[tuple[str, Callable[[], PromptEntry]]]:
    # Not splitlines, which also breaks at signs that prompts copied from the web hold, such as U+2028.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", partial(_read_line, f"line {number}", line)


def _read_line(where: str, line: bytes) -> PromptEntry:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} is no text in UTF-8") from error
    return _entry(where, {"prompt": text})


def _read_json(data: bytes) -> Iterable[tuple[str, Callable[[], PromptEntry]]]:
    repeated: list[str] = []
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=partial(_unique, repeated))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno} is no JSON: {error.msg}") from error
    for key in repeated:  # JSON keeps the last one and says nothing
        yield f"entry {key!r}", partial(_refuse, "the key stands there twice, and only the last one counts")
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"entry {key!r}", partial(_read_entry, f"entry {key!r}", value, key)
    elif isinstance(content, list):
        for number, value in enumerate(content, 1):
            yield f"entry {number}", partial(_read_entry, f"entry {number}", value, None)
    else:
        raise ValueError("expected a list of prompts, or an object with a prompt for each name")


def _unique(repeated: list[str], pairs: list[tuple[str, object]]) -> dict:
    unique = {}
    for key, value in pairs:
        if key in unique:
            repeated.append(key)
        unique[key] = value
    return unique


def _refuse(text: str) -> PromptEntry:
    raise ValueError(text)


def _read_entry(where: str, value: object, key: str | None) -> PromptEntry:
    settings = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or settings.get("prompt") is None:
        raise ValueError('expected the prompt as text, or an object with "prompt"')
    return _entry(where, settings if key is None else settings | {"name": key})


def _entry(where: str, settings: dict) -> PromptEntry:
    prompt, size = _split_suffixes(_text(settings, "prompt"))
    if not prompt:
        raise ValueError("the prompt is empty")
    sides = {side: _number(settings, side, 1, MAX_SIDE) for side in ("height", "width")}
    if size and any(sides.values()):
        raise ValueError("the size stands there twice, as height or width and as a suffix of the prompt")
    return PromptEntry(
        safe_name(_text(settings, "name") or "") or safe_name(prompt) or "picture",
        prompt,
        where,
        negative_prompt=_text(settings, "negative_prompt"),
        seed=_number(settings, "seed", 0, MAX_SEED),
        **sides | size,
    )


def _split_suffixes(text: str) -> tuple[str, dict]:
    """The prompt without its suffixes, and the fields of PromptEntry that they give."""
    match = _SUFFIX.search(text)
    if match is None:
        return text.strip(), {}
    tail = text[match.start() :]
    if _SUFFIX_VALUE.sub("", tail).strip():
        raise ValueError(
            f"{tail.strip()!r} is not understood: expected --ar or --hw with height:width in whole numbers, and "
            "nothing after it, such as --ar 3:4 or --hw 1024:768"
        )
    values = {kind: (int(height), int(width)) for kind, height, width in reversed(_SUFFIX_VALUE.findall(tail))}
    if 0 in [side for sides in values.values() for side in sides]:
        raise ValueError(f"{tail.strip()!r} has a side of 0")
    if "hw" in values:
        height, width = values["hw"]
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"{tail.strip()!r} is more than {MAX_SIDE} px")
        return text[: match.start()].strip(), {"height": height, "width": width}
    return text[: match.start()].strip(), {"aspect_ratio": values.get("aspect_ratio") or values["ar"]}


def _text(settings: dict, key: str) -> str | None:
    value = settings.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f'"{key}" is {json.dumps(value)}: expected text')
    return value


def _number(settings: dict, key: str, least: int, most: int) -> int | None:
    value = settings.get(key)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:  # True is an int as well, to isinstance
        raise ValueError(f'"{key}" is {json.dumps(value)}: expected a whole number from {least} to {most}')
    return value


def _on_grid(side: int | None) -> int | None:
    return None if side is None else max((side + MULTIPLE // 2) // MULTIPLE, 1) * MULTIPLE


def _free_name(name: str, taken: set[str]) -> str:
    """The name, with a number if an earlier entry has it; a file system may not tell upper from lower case."""
    free = name
    for number in itertools.count(2):
        if free.casefold() not in taken:
            taken.add(free.casefold())
            return free
        free = f"{name}_{number}"


_READERS = {".txt": _read_lines, ".json": _read_json}
