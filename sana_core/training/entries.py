"""What every layout of a data set is read into: pictures with their captions, and problems."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .captions import Caption, decode_caption

# What to do about the commonest reasons to leave out a file.
ADVICE = {
    "no caption": "Write captions, or choose with 'missing captions' what becomes of such pictures.",
    "picture cannot be read": "Save the pictures anew, or remove them.",
    "kind of picture that is not read": "Convert the pictures to PNG, JPEG or WebP.",
    "too small": "Choose a lower resolution, or use larger pictures.",
    "all captions score too low": "Choose a lower score, or write better captions.",
    "caption without a picture": "Put the pictures beside them, under the same names.",
}


@dataclass(frozen=True)
class Content:
    """Where the bytes of a file are: in a file of its own, or in a stretch of a tar."""

    path: Path
    offset: int = 0
    size: int | None = None  # None: to the end of the file

    def read(self) -> bytes:
        """The bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)

    def source(self) -> Path | bytes:
        """What `read_size` needs: the path of a whole file, so that only its header is read."""
        return self.path if self.size is None else self.read()


@dataclass(frozen=True)
class Entry:
    """One picture as the layout lists it; nothing of it has been read but its captions."""

    name: str  # path relative to the data set
    content: Content
    captions: tuple[Caption, ...]  # empty if it has none
    repeats: int = 1  # how often it counts


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file."""

    name: str  # path relative to the data set
    reason: str  # the same words for all files with it, so that they can be counted
    detail: str = ""
    left_out: bool = True  # False: it is used all the same

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


def left_out_in_short(problems: Iterable[Problem]) -> str:
    """How many files are left out for which reason, the first of them, and what to do; "" where none is."""
    left_out = [problem for problem in problems if problem.left_out]
    if not left_out:
        return ""
    counts = Counter(problem.reason for problem in left_out).most_common()
    found = ", ".join(f"{count} x {reason}" for reason, count in counts)
    first = next(problem for problem in left_out if problem.reason == counts[0][0])
    return f"{found}. The first is {first}. {ADVICE.get(first.reason, '')}".rstrip()


@dataclass
class Listing:
    """What was found in a data set so far."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, detail: object = "") -> None:
        """Note a file that is not used."""
        self.problems.append(Problem(name, reason, str(detail)))

    def warn(self, name: str, reason: str, detail: object = "") -> None:
        """Note a file that is used all the same."""
        self.problems.append(Problem(name, reason, str(detail), left_out=False))


def files_below(folder: Path, listing: Listing) -> Iterator[Path]:
    """Every file of the folder and its sub-folders, sorted; hidden ones and the Finder's leftovers are not data."""

    def note(error: OSError) -> None:
        listing.leave_out(relative_name(Path(error.filename), folder), "folder cannot be read", error.strerror)

    for place, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def relative_name(path: Path, folder: Path) -> str:
    """What a file of a data set is called in messages."""
    return printable(path.relative_to(folder).as_posix())


def printable(name: str) -> str:
    """The name, with what is not Unicode in it spelled out: terminals and JSON files refuse it."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_caption_file(content: Content, name: str, listing: Listing) -> str | None:
    """Text of a caption file, "" for an empty one; None where it cannot be read, which is noted."""
    try:
        return decode_caption(content.read())
    except (ValueError, OSError) as error:
        listing.leave_out(name, "caption cannot be read", error)
        return None
