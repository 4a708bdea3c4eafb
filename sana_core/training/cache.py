"""Latents and text features of a data set, computed once and kept on disk, shared by all runs that need the same.

An entry is found by what it was computed from: the bytes of the picture (or the text of the caption), the identity of
the encoder, and the bucket. An edited file therefore has another entry, and an old one is never mistaken for it.

Latents are kept in float16: scaled to unit deviation they are far from its limits, and rounding to it changes a value
by 2^-11 of itself at most, a quarter of what bfloat16 would. Text features stay in their encoder's dtype, without
padding. Pictures and captions are encoded one at a time, so that an entry never depends on what it was computed with.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..finite import require_finite
from ..resolution import Size
from .captions import Caption
from .dataset import WORKERS, Dataset, Sample
from .encoders import Encoder
from .entries import Problem
from .folders import DatasetError
from .images import ImageError, fit_to_bucket, read_image
from .shards import Shards

logger = logging.getLogger(__name__)

LATENT_DTYPE = torch.float16
LAYOUT = "1"  # of the entries: to be counted up with any change of how pictures are fitted or entries are stored

OnProgress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class CachedSample:
    """One picture to train on, whose latents and features are in the cache."""

    name: str  # path relative to the data set
    bucket: Size
    captions: tuple[Caption, ...]
    latent: str  # key of its latents
    features: tuple[str, ...]  # keys of its captions' features


class Cache:
    """The entries of one autoencoder and one text encoder below a folder."""

    def __init__(self, folder: str | Path, latents: Encoder, text: Encoder):
        """Opens the cache, or starts one. Raises OSError where the folder cannot be made."""
        self._encoders = latents, text
        self._latents = Shards(Path(folder) / "latents" / f"{LAYOUT}-{latents.identity[:32]}")
        self._features = Shards(Path(folder) / "text" / f"{LAYOUT}-{text.identity[:32]}")

    def fill(
        self, dataset: Dataset, on_progress: OnProgress | None = None
    ) -> tuple[tuple[CachedSample, ...], list[Problem]]:
        """Encode what is not there yet, with progress bars on the terminal: one for captions, one for pictures.

        It may be killed at any time, and goes on from there when called again. Several processes may fill one cache.

        Args:
            dataset: pictures that cannot be read turn up as problems here, at the latest.
            on_progress: called after each picture and each caption; what it raises ends the filling, and all that was
                computed is kept.

        Raises:
            FloatingPointError: NaN or infinity from an encoder; names the file.
            DatasetError: not one picture could be read.
            OSError: the disk is full.
        """
        unique = list(dict.fromkeys(dataset.samples))
        captions = list(dict.fromkeys(["", *(caption.text for sample in unique for caption in sample.captions)]))
        names = {caption.text: sample.name for sample in unique for caption in sample.captions}
        count = _Counter(len(unique) + len(captions), on_progress)
        problems: list[Problem] = []
        keys: dict[Sample, str] = {}
        try:
            for caption in tqdm(captions, "captions", leave=False):
                self._add_features(caption, names.get(caption, "the empty caption"))
                count.step()
            for sample, content in tqdm(_read_ahead(self._read, unique), "latents", len(unique), leave=False):
                if isinstance(content, ImageError):
                    detail = str(content).removeprefix(f"{sample.name}: ")
                    problems.append(Problem(sample.name, "picture cannot be read", detail))
                else:
                    keys[sample] = self._add_latents(sample, *content)
                count.step()
        finally:
            self._latents.flush()
            self._features.flush()
        if not keys:
            raise DatasetError(f"{dataset.folder}: not one of {len(unique)} pictures could be read. {problems[0]}")
        for problem in problems:
            logger.warning("left out: %s", problem)
        return tuple(_cached(s, keys[s]) for s in dataset.samples if s in keys), problems

    def latents(self, sample: CachedSample) -> Tensor:
        """Scaled latents [C, h, w], float32."""
        return self._latents[sample.latent].float()

    def features(self, key: str) -> Tensor:
        """Features [L, C] of a caption, without padding, in the encoder's dtype. `key` is one of a sample's."""
        return self._features[key]

    @property
    def null_features(self) -> Tensor:
        """Features [L, C] of the empty caption, which takes the place of dropped ones; all positions attend."""
        return self._features[caption_key("")]

    def _read(self, sample: Sample) -> tuple[str, Tensor | None] | ImageError:
        """Key of the sample's latents, and its pixels if they are needed; the error if it cannot be read."""
        try:
            content = sample.content.read()
            key = latent_key(content, sample.bucket)
            if key in self._latents:
                return key, None
            return key, fit_to_bucket(read_image(content, sample.name), sample.bucket.height, sample.bucket.width)
        except OSError as error:
            return ImageError(f"{sample.name}: {error.strerror or error}")
        except ImageError as error:
            return error

    def _add_latents(self, sample: Sample, key: str, pixels: Tensor | None) -> str:
        if pixels is not None and not _has(self._latents, key):
            latents = self._encode(lambda: self._encoders[0].encode(pixels[None]), sample.name)
            self._latents.add(key, require_finite(latents[0].to(LATENT_DTYPE), f"{sample.name}: the autoencoder"))
        return key

    def _add_features(self, caption: str, name: str) -> None:
        key = caption_key(caption)
        if _has(self._features, key):
            return
        embeds, mask = self._encode(lambda: self._encoders[1].encode(caption), f"{name} (caption)")
        features = embeds[0, : int(mask[0].sum())]  # padded on the right
        self._features.add(key, require_finite(features, f"{name} (caption): the text encoder"))

    def _encode(self, encode: Callable, name: str):
        try:
            return encode()
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from error


def latent_key(content: bytes, bucket: Size) -> str:
    """Under which the latents of a picture file are kept."""
    return f"{hashlib.sha256(content).hexdigest()}-{bucket}"


def caption_key(caption: str) -> str:
    """Under which the features of a caption are kept."""
    return hashlib.sha256(caption.encode()).hexdigest()


def _cached(sample: Sample, latent: str) -> CachedSample:
    features = tuple(caption_key(caption.text) for caption in sample.captions)
    return CachedSample(sample.name, sample.bucket, sample.captions, latent, features)


def _has(shards: Shards, key: str) -> bool:
    """Whether this process or, by now, another has computed the entry: a look into the folder is cheap beside it."""
    if key not in shards:
        shards.refresh()
    return key in shards


def _read_ahead(read: Callable, samples: Sequence[Sample]) -> Iterator[tuple[Sample, object]]:
    """Each sample with what `read` makes of it, a few of them ahead: decoding takes as long as encoding does."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque = deque()
        for sample in samples:
            waiting.append((sample, pool.submit(read, sample)))
            if len(waiting) > 2 * WORKERS:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(sample: Sample, future) -> tuple[Sample, object]:
    return sample, future.result()


class _Counter:
    """Tells the callback how far the filling is."""

    def __init__(self, total: int, on_progress: OnProgress | None):
        self._done, self._total = 0, total
        self._on_progress = on_progress

    def step(self) -> None:
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


def fingerprint(samples: Iterable[CachedSample]) -> str:
    """Hash of everything that the batches are made of: equal on all ranks, and the same when a run is resumed."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.name, str(sample.bucket), sample.latent, sample.captions)).encode())
    return digest.hexdigest()
