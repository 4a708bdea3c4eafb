"""Data sets of loose files: pairs of picture and caption, the official meta_data.json, and metadata.jsonl."""

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from .captions import Caption, clean_caption, decode_caption
from .entries import Content, Entry, Listing, printable, read_caption_file, relative_name
from .images import EXTENSIONS, NOT_READ
from .sidecars import DEFAULT_KIND, Captions, Sidecars

META_DATA = "meta_data.json"  # NVlabs/Sana's: {"img_names": ["AAA", ...]}; a name that is repeated counts as often
METADATA = "metadata.jsonl"  # Hugging Face's: {"file_name": "AAA.png", "text": "a caption"} in each line

Key = tuple[Path, str]  # folder and name without extension, in composed Unicode


class DatasetError(ValueError):
    """A data set that cannot be used: says which, what was found, and what was expected."""


def read_pairs(folder: Path, files: Sequence[Path], sidecars: Sidecars, listing: Listing) -> None:
    """AAA.png, .jpg, .jpeg or .webp with its caption in AAA.txt or AAA*.json beside it."""
    pictures, texts = _group(files)
    _warn_of_same_names(folder, pictures, listing)
    for key, paths in pictures.items():
        captions = _captions_of(folder, key, texts, sidecars, listing)
        if captions is not None:
            listing.entries += [Entry(relative_name(path, folder), Content(path), captions) for path in paths]
    unread = {(path.parent, path.stem): path for path in files if path.suffix.lower() in NOT_READ}
    for path in unread.values():
        listing.leave_out(relative_name(path, folder), "kind of picture that is not read", path.suffix)
    composed = {(parent, unicodedata.normalize("NFC", stem)) for parent, stem in unread}
    for key in sorted(texts.keys() - pictures.keys() - composed):
        listing.leave_out(relative_name(texts[key], folder), "caption without a picture")


def read_meta_data(folder: Path, files: Sequence[Path], sidecars: Sidecars, listing: Listing) -> None:
    """The pictures that the official meta_data.json names, with captions as above."""
    path = folder / META_DATA
    names = _img_names(path)
    pictures, texts = _group(files)
    for name, repeats in Counter(names).items():
        pure = PurePosixPath(unicodedata.normalize("NFC", name))
        is_file_name = pure.suffix.lower() in EXTENSIONS  # the name may come with or without its extension
        key = (folder / pure.parent, pure.stem if is_file_name else pure.name)
        found = [p for p in pictures.get(key, ()) if not is_file_name or p.suffix.lower() == pure.suffix.lower()]
        if not found:
            listing.leave_out(printable(name), f"named by {META_DATA}, but there is no picture of that name")
            continue
        captions = _captions_of(folder, key, texts, sidecars, listing)
        if captions is not None:
            listing.entries.append(Entry(relative_name(found[0], folder), Content(found[0]), captions, repeats))


def read_metadata(folder: Path, listing: Listing) -> None:
    """The pictures that metadata.jsonl names; "text" is a caption or a list of several."""
    for number, line in enumerate((folder / METADATA).read_bytes().split(b"\n"), start=1):
        name = f"{METADATA} line {number}"
        try:
            if text := decode_caption(line):
                _read_record(folder, name, json.loads(text), listing)
        except (ValueError, OSError, RecursionError) as error:  # OSError: a name that is too long
            listing.leave_out(name, "line cannot be read", error)


def _read_record(folder: Path, line: str, record: object, listing: Listing) -> None:
    file_name = record.get("file_name") if isinstance(record, dict) else None
    texts = record.get("text") if isinstance(record, dict) else None
    texts = [texts] if isinstance(texts, str) else texts or []
    if not isinstance(file_name, str) or not file_name:
        raise ValueError('expected an object with "file_name" and "text"')
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected "text" to be a caption or a list of captions')
    if PurePosixPath(file_name).is_absolute() or ".." in PurePosixPath(file_name).parts:
        raise ValueError(f"{file_name} is outside of the folder")
    if not (folder / file_name).is_file():
        listing.leave_out(printable(file_name), f"named by {METADATA}, but there is no such file", line)
        return
    captions = tuple(Caption(text) for text in map(clean_caption, texts) if text)
    listing.entries.append(Entry(printable(file_name), Content(folder / file_name), captions))


def _img_names(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON ({error}). Mend it, or remove it to use all pictures.") from error
    names = content.get("img_names") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f'{path} has no list of names under "img_names". Mend it, or remove it.')
    return names


def _group(files: Sequence[Path]) -> tuple[dict[Key, list[Path]], dict[Key, Path]]:
    """Pictures and caption files by their name without extension; macOS decomposes accents, others do not."""
    pictures: dict[Key, list[Path]] = {}
    texts: dict[Key, Path] = {}
    for path in files:
        key = (path.parent, unicodedata.normalize("NFC", path.stem))
        if path.suffix.lower() in EXTENSIONS:
            pictures.setdefault(key, []).append(path)
        elif path.suffix.lower() == ".txt":
            texts.setdefault(key, path)
    return pictures, texts


def _captions_of(folder: Path, key: Key, texts: dict[Key, Path], sidecars: Sidecars, listing: Listing):
    """The picture's captions; None where its caption file cannot be read, which is noted."""
    captions = Captions()
    if key in texts:
        text = read_caption_file(Content(texts[key]), relative_name(texts[key], folder), listing)
        if text is None:
            return None
        captions.texts[DEFAULT_KIND] = text
    sidecars.add_to(captions, key[0] / key[1], key[1])
    return captions.joined()


def _warn_of_same_names(folder: Path, pictures: dict[Key, list[Path]], listing: Listing) -> None:
    folded: dict[Key, list[Path]] = {}
    for (parent, stem), paths in pictures.items():
        folded.setdefault((parent, stem.casefold()), []).append(paths[0])
        for path in paths[1:]:
            listing.warn(relative_name(path, folder), "shares its caption file", f"with {paths[0].name}")
    for paths in folded.values():
        for path in paths[1:]:
            listing.warn(relative_name(path, folder), "differs only in case from another", paths[0].name)
