"""Data sets of WebDataset tars, read at random places: a tar is listed once, then each picture is one seek away.

The webdataset library streams tars in their own order. A plan that a resumed run can take up at any step needs every
sample by its number, so the tars are indexed with the standard library, under the same rule: what has the same name
up to the first dot of its base name is one sample.
"""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .captions import clean_caption
from .entries import Content, Entry, Listing, printable, read_caption_file, relative_name
from .images import EXTENSIONS
from .sidecars import DEFAULT_KIND, Captions, Sidecars

WIDS_META = "wids-meta.json"  # NVlabs/Sana `tools/create_wids_metadata.py`: lists the shards


def read_archives(folder: Path, tars: Sequence[Path], sidecars: Sidecars, listing: Listing) -> None:
    """KEY.png, .jpg, .jpeg or .webp with KEY.json ({"prompt": ...}) or KEY.txt, in each of the tars."""
    for tar in tars:
        name = relative_name(tar, folder)
        for key, members in _index(tar, name, listing).items():
            _add_sample(tar, f"{name}/{printable(key)}", key, members, sidecars, listing)


def missing_shards(folder: Path, listing: Listing) -> None:
    """Note the shards that wids-meta.json lists and that are not there."""
    path = folder / WIDS_META
    if not path.is_file():
        return
    try:
        urls = [shard["url"] for shard in json.loads(path.read_text(encoding="utf-8-sig"))["shardlist"]]
    except (ValueError, KeyError, TypeError) as error:
        listing.warn(WIDS_META, "JSON file cannot be read", error)
        return
    for url in urls:
        if not (folder / Path(str(url)).name).is_file():
            listing.leave_out(Path(str(url)).name, f"shard named by {WIDS_META} is missing")


def _index(tar: Path, name: str, listing: Listing) -> dict[str, dict[str, Content]]:
    """Samples of a tar: key -> extension in lower case -> content."""
    samples: dict[str, dict[str, Content]] = {}
    size, end = tar.stat().st_size, 0
    try:
        with tarfile.open(tar, "r:") as archive:  # uncompressed: nothing else can be read at random places
            for member in archive:
                end = member.offset_data + member.size
                place, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isreg() or not stem or end > size:
                    continue
                key = f"{place}/{stem}" if place else stem
                contents = samples.setdefault(key, {})
                if extension.lower() in contents:
                    listing.warn(f"{name}/{printable(member.name)}", "second of its name in the tar is not used")
                contents.setdefault(extension.lower(), Content(tar, member.offset_data, member.size))
        if size - end < tarfile.BLOCKSIZE:  # tarfile is content without the empty block that ends every tar
            raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, OSError) as error:
        listing.leave_out(name, "tar is damaged, cut short or compressed: the rest of it is not used", error)
    return samples


def _add_sample(
    tar: Path, name: str, key: str, members: dict[str, Content], sidecars: Sidecars, listing: Listing
) -> None:
    extension = next((extension for extension in EXTENSIONS if extension[1:] in members), None)
    if extension is None:
        reason = "latents without a picture" if "npy" in members else "sample without a picture"
        listing.leave_out(name, reason, f"found {', '.join(sorted(members))}")
        return
    captions = Captions()
    fields = _read_fields(name, members, listing)
    if "txt" in members:
        text = read_caption_file(members["txt"], f"{name}.txt", listing)
        if text is None:
            return
        captions.texts[DEFAULT_KIND] = text
    if fields.get(DEFAULT_KIND):
        captions.texts[DEFAULT_KIND] = fields[DEFAULT_KIND]
    sidecars.add_to(captions, tar.with_suffix(""), key)
    # Other fields of the sample's JSON are captions if someone scored them as such.
    captions.texts |= {kind: fields[kind] for kind in captions.scores if kind in fields and kind not in captions.texts}
    listing.entries.append(Entry(f"{name}{extension}", members[extension[1:]], captions.joined()))


def _read_fields(name: str, members: dict[str, Content], listing: Listing) -> dict[str, str]:
    """The texts in the sample's JSON."""
    if "json" not in members:
        return {}
    try:
        content = json.loads(members["json"].read().decode("utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        listing.warn(f"{name}.json", "JSON file cannot be read", error)
        return {}
    if not isinstance(content, dict):
        listing.warn(f"{name}.json", "JSON file cannot be read", f"a {type(content).__name__}, expected an object")
        return {}
    return {kind: clean_caption(text) for kind, text in content.items() if isinstance(text, str)}
