"""Captions and their CLIP scores in JSON files beside pictures or shards, as NVlabs/Sana's captioning writes them.

`AAA_InternVL2-26B.json` holds {"AAA": {"InternVL2-26B": "a caption"}}, `AAA_InternVL2-26B_clip_score.json` holds
{"AAA": {"InternVL2-26B": "26.7"}}. Beside `SHARD.tar` stand `SHARD_InternVL2-26B.json` and so on, with all keys of it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .captions import Caption, clean_caption
from .entries import Listing, relative_name

DEFAULT_KIND = "prompt"  # of the caption in AAA.txt, or under "prompt" in a sample's JSON
SCORES_END = "_clip_score"
SEPARATORS = "_-."  # between the name of a picture or shard and the kind of captions


@dataclass
class Captions:
    """All captions of one picture and their scores, by their kind."""

    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def joined(self) -> tuple[Caption, ...]:
        """The captions that are not empty, each with its score."""
        return tuple(Caption(text, self.scores.get(kind)) for kind, text in self.texts.items() if text)


class Sidecars:
    """The JSON files of a data set, found by the picture or shard that they belong to."""

    def __init__(self, files: Iterable[Path], folder: Path, listing: Listing):
        """`files` are all JSON files that may hold captions; what is wrong with them goes to `listing`."""
        self._listing = listing
        self._by_owner: dict[Path, list[tuple[str, str, object]]] = {}  # owner -> (file name, suffix, content)
        for path in files:
            try:
                content = json.loads(path.read_text(encoding="utf-8-sig"))
            except (ValueError, OSError, RecursionError) as error:
                listing.warn(relative_name(path, folder), "JSON file cannot be read", error)
                continue
            for end in range(1, len(path.stem) + 1):
                if end == len(path.stem) or path.stem[end] in SEPARATORS:
                    owner = path.with_name(path.stem[:end])
                    self._by_owner.setdefault(owner, []).append((relative_name(path, folder), path.stem[end:], content))

    def add_to(self, captions: Captions, owner: Path, key: str) -> None:
        """Add what is known of the picture `key`; `owner` is the path of picture or shard without its extension."""
        scores: dict[str, float] = {}
        for name, suffix, content in self._by_owner.get(owner, ()):
            if not isinstance(content, dict):
                continue
            values = content.get(key)
            if not isinstance(values, dict):
                # A sample's own JSON, unpacked from a tar: {"prompt": "a caption", "width": ...}
                values = content if not suffix and isinstance(content.get(DEFAULT_KIND), str) else {}
                values = {kind: text for kind, text in values.items() if kind == DEFAULT_KIND}
            if suffix.endswith(SCORES_END):
                scores |= self._scores(name, values)
            else:
                captions.texts |= _texts(values, suffix, captions.texts)
        captions.scores |= scores

    def _scores(self, name: str, values: dict) -> dict[str, float]:
        scores = {}
        for kind, value in values.items():
            try:
                score = float(value)
            except (TypeError, ValueError):
                score = math.nan
            if math.isfinite(score):
                scores[kind] = score
            else:
                self._listing.warn(name, "score is not a number", f"{kind}: {value!r}")
        return scores


def _texts(values: dict, suffix: str, known: dict[str, str]) -> dict[str, str]:
    """The captions by kind; a second one of the default kind is named by the file that it stands in, as upstream."""
    return {
        suffix if kind == DEFAULT_KIND and kind in known and suffix else kind: clean_caption(text)
        for kind, text in values.items()
        if isinstance(text, str)
    }
