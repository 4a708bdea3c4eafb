"""A data set in any layout, as the list of pictures that can be trained on, and the list of problems with the rest."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..resolution import Size
from .archives import WIDS_META, missing_shards, read_archives
from .buckets import check_base, choose_bucket, cropped_share
from .captions import OFFICIAL_CHOICE, Caption, CaptionChoice, clean_caption
from .entries import Content, Entry, Listing, Problem, files_below, left_out_in_short
from .folders import META_DATA, METADATA, DatasetError, read_meta_data, read_metadata, read_pairs
from .images import EXTENSIONS, ImageError, is_animated, read_image, read_size
from .sidecars import Sidecars

MAX_ENLARGEMENT = 2  # a picture that must be enlarged more to cover its bucket is left out
MAX_CROPPED_SHARE = 0.3  # above it there is a warning
WORKERS = min(8, os.cpu_count() or 1)

MISSING_CAPTIONS = ("skip", "error", "empty", "filename")  # or "text:" with the caption for them


@dataclass(frozen=True)
class Sample:
    """One picture to train on."""

    name: str  # path relative to the data set
    content: Content
    captions: tuple[Caption, ...]  # at least one
    size: Size  # upright
    bucket: Size  # what it is scaled and cut to


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder. One that counts several times is in `samples` as often."""

    folder: Path
    base: int  # pixels; which table the buckets are from
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    choice: CaptionChoice = OFFICIAL_CHOICE  # of one caption of several

    def buckets(self) -> dict[Size, int]:
        """Samples in each bucket, from wide to tall."""
        counts = Counter(sample.bucket for sample in self.samples)
        return dict(sorted(counts.items(), key=lambda item: item[0].height / item[0].width))


def read_dataset(
    folder: str | Path,
    base: int,
    *,
    missing_captions: str = "skip",
    min_score: float = 0.0,
    choice: CaptionChoice = OFFICIAL_CHOICE,
    decode: bool = False,
) -> Dataset:
    """Read the data set in a folder, or in one tar.

    `metadata.jsonl` decides which pictures are used, else `meta_data.json`, else all pictures and tars are.

    Args:
        folder: with pictures and captions in one of the layouts, or a .tar.
        base: table of aspect ratios: 256, 512, 1024, 2048 or 4096 pixels.
        missing_captions: what becomes of pictures without a caption: "skip" leaves them out, "error" raises, "empty"
            trains them as unconditional, "filename" reads the file's name, "text:a photo of it" takes that text.
        min_score: pictures whose captions are all scored below it are left out (upstream's del_img_clip_thr).
        choice: how one of several captions is drawn when the data set is trained on.
        decode: decode every picture and compare contents, which finds damaged and double ones before caching would.

    Raises:
        DatasetError: nothing usable; or a caption is missing, under "error".
    """
    check_base(base)
    folder = Path(folder)
    default_caption = _caption_policy(missing_captions)
    listing = _list_files(folder)
    entries = [
        entry
        for entry in (_with_caption(entry, default_caption, listing) for entry in _once_each(listing))
        if entry is not None and _is_fitting(entry, min_score, listing)
    ]
    inspect = _decode if decode else _inspect
    with ThreadPoolExecutor(WORKERS) as pool:
        findings = list(tqdm(pool.map(inspect, entries), "pictures", len(entries), leave=False, disable=not decode))
    listing.problems += [problem for _, problems, _ in findings for problem in problems]
    samples = []
    first_of: dict[str, str] = {}  # hash of the content -> name
    for entry, (size, _, digest) in zip(entries, findings, strict=True):
        if size is None or (sample := _sample(entry, size, base, listing)) is None:
            continue
        samples += [sample] * entry.repeats
        if digest is not None and first_of.setdefault(digest, entry.name) != entry.name:
            listing.warn(entry.name, "same content as another", first_of[digest])
    if not samples:
        raise DatasetError(_nothing_usable(folder, listing.problems))
    return Dataset(folder, base, tuple(samples), tuple(listing.problems), choice)


def _caption_policy(missing_captions: str) -> Callable[[str], str | None]:
    """Maps the name of a picture without caption to its caption, None to leave it out."""
    if missing_captions == "skip":
        return lambda name: None
    if missing_captions == "empty":
        return lambda name: ""
    if missing_captions == "filename":
        return lambda name: clean_caption(Path(name).stem.replace("_", " "))
    if missing_captions.startswith("text:"):
        return lambda name: clean_caption(missing_captions.removeprefix("text:"))
    if missing_captions != "error":
        choices = ", ".join(MISSING_CAPTIONS)
        raise ValueError(f'missing captions: "{missing_captions}" is none of {choices}, and no "text:" with a caption')

    def refuse(name: str) -> str:
        raise DatasetError(f"{name} has no caption. Write one, or choose what becomes of such pictures.")

    return refuse


def _list_files(folder: Path) -> Listing:
    """All pictures of the data set, in whatever layout it is."""
    listing = Listing()
    if folder.is_file() and folder.suffix.lower() == ".tar":
        beside = (path for path in sorted(folder.parent.iterdir()) if path.name.startswith(folder.stem))
        sidecars = Sidecars(_json_files(beside), folder.parent, listing)
        read_archives(folder.parent, [folder], sidecars, listing)
        return listing
    if not folder.is_dir():
        found = "is no folder and no .tar" if folder.exists() else "does not exist"
        raise DatasetError(f"{folder} {found}. Choose the folder that holds the pictures, or one .tar.")
    if (folder / METADATA).is_file():
        read_metadata(folder, listing)
        return listing
    files = list(files_below(folder, listing))
    sidecars = Sidecars(_json_files(files), folder, listing)
    if (folder / META_DATA).is_file():
        read_meta_data(folder, files, sidecars, listing)
        return listing
    read_pairs(folder, files, sidecars, listing)
    read_archives(folder, [path for path in files if path.suffix.lower() == ".tar"], sidecars, listing)
    missing_shards(folder, listing)
    return listing


def _json_files(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() == ".json" and path.name not in (META_DATA, WIDS_META)]


def _once_each(listing: Listing) -> list[Entry]:
    """The entries, sorted by name: the order in which a disk lists files must not decide what is trained."""
    return sorted(listing.entries, key=lambda entry: entry.name)


def _with_caption(entry: Entry, default_caption: Callable[[str], str | None], listing: Listing) -> Entry | None:
    if entry.captions:
        return entry
    caption = default_caption(entry.name)
    if caption is None:
        listing.leave_out(entry.name, "no caption")
        return None
    listing.warn(entry.name, "no caption, one was made up", caption)
    return replace(entry, captions=(Caption(caption),))


def _is_fitting(entry: Entry, min_score: float, listing: Listing) -> bool:
    scores = [caption.score for caption in entry.captions if caption.score is not None]
    if not scores or max(scores) >= min_score:
        return True
    listing.leave_out(entry.name, "all captions score too low", f"best {max(scores):g}, wanted {min_score:g}")
    return False


Finding = tuple[Size | None, list[Problem], str | None]  # size (None: unusable), problems, hash of the content


def _inspect(entry: Entry) -> Finding:
    """What the header tells."""
    try:
        return read_size(entry.content.source(), entry.name), [], None
    except (ImageError, OSError) as error:
        return None, [_unreadable(entry, error)], None


def _decode(entry: Entry) -> Finding:
    """What the whole content tells."""
    try:
        content = entry.content.read()
        image = read_image(content, entry.name)
    except (ImageError, OSError) as error:
        return None, [_unreadable(entry, error)], None
    problems = []
    if is_animated(content):
        problems.append(Problem(entry.name, "animated: only its first frame is used", left_out=False))
    return Size(image.height, image.width), problems, hashlib.sha256(content).hexdigest()


def _unreadable(entry: Entry, error: Exception) -> Problem:
    return Problem(entry.name, "picture cannot be read", str(error).removeprefix(f"{entry.name}: "))


def _sample(entry: Entry, size: Size, base: int, listing: Listing) -> Sample | None:
    bucket = choose_bucket(size.height, size.width, base)
    enlargement = max(bucket.height / size.height, bucket.width / size.width)
    if enlargement > MAX_ENLARGEMENT:
        listing.leave_out(entry.name, "too small", f"{size}, less than half of {bucket}")
        return None
    if enlargement > 1:
        listing.warn(entry.name, "enlarged", f"{size} to cover {bucket}")
    cropped = cropped_share(size.height, size.width, bucket)
    if cropped > MAX_CROPPED_SHARE:
        listing.warn(entry.name, "much is cut off", f"{cropped:.0%} of {size} to fit {bucket}")
    return Sample(entry.name, entry.content, entry.captions, size, bucket)


def _nothing_usable(folder: Path, problems: Iterable[Problem]) -> str:
    return (
        f"{folder} holds no picture to train on: looked for {', '.join(EXTENSIONS)} with a caption in .txt or .json "
        f"beside it, {METADATA}, {META_DATA} and .tar. Found: {left_out_in_short(problems) or 'no such file.'}"
    )
