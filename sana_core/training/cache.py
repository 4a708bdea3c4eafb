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
from .distributed import Single
from .encoders import Encoder
from .entries import Problem
from .folders import DatasetError
from .images import ImageError, fit_to_bucket, read_image
from .shards import Shards

logger = logging.getLogger(__name__)

LATENT_DTYPE = torch.float16
LAYOUT = "1"  # of the entries: to be counted up with any change of how pictures are fitted or entries are stored

ALONE = Single("cpu")

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
        self, dataset: Dataset, on_progress: OnProgress | None = None, *, ranks: Single = ALONE
    ) -> tuple[tuple[CachedSample, ...], list[Problem]]:
        """Encode what is not there yet, with progress bars on the terminal: one for captions, one for pictures.

        It may be killed at any time, and goes on from there when called again. Several processes may fill one cache.

        Args:
            dataset: the same on all ranks. Pictures that cannot be read turn up as problems here, at the latest.
            on_progress: called after each picture and each caption; what it raises ends the filling, and all that was
                computed is kept.
            ranks: share the work; each waits for the others, and all get the same result.

        Raises:
            FloatingPointError: NaN or infinity from an encoder; names the file.
            DatasetError: not one picture could be read.
            OSError: the disk is full.
        """
        unique = list(dict.fromkeys(dataset.samples))
        captions = list(dict.fromkeys(["", *(caption.text for sample in unique for caption in sample.captions)]))
        names = {caption.text: sample.name for sample in unique for caption in sample.captions}
        numbered = list(enumerate(unique))
        own, step = ranks.rank, ranks.world_size
        share = numbered[own::step]
        count = _Counter(len(share) + len(captions[own::step]), on_progress, silent=own > 0)
        self._encode_captions(captions[own::step], names, count)
        findings = self._encode_pictures(share, count)
        if ranks.world_size > 1:
            findings = {number: finding for share in ranks.gather(findings) for number, finding in share.items()}
            self._encode_lacking(captions, names, numbered, findings, _Counter(0, None, silent=True))
        keys = {sample: findings[number] for number, sample in numbered if isinstance(findings[number], str)}
        problems = [finding for _, finding in sorted(findings.items()) if isinstance(finding, Problem)]
        if not keys:
            raise DatasetError(f"{dataset.folder}: not one of {len(unique)} pictures could be read. {problems[0]}")
        for problem in problems if ranks.rank == 0 else ():
            logger.warning("left out: %s", problem)
        return tuple(_cached(s, keys[s]) for s in dataset.samples if s in keys), problems

    def _encode_captions(self, captions: Sequence[str], names: dict[str, str], count: "_Counter") -> None:
        try:
            for caption in tqdm(captions, "captions", leave=False, disable=count.silent):
                self._add_features(caption, names.get(caption, "the empty caption"))
                count.step()
        finally:
            self._features.flush()

    def _encode_pictures(self, pictures: Sequence[tuple[int, Sample]], count: "_Counter") -> dict[int, str | Problem]:
        """Key of each picture's latents, or what is wrong with it, by the number that stands before it."""
        findings: dict[int, str | Problem] = {}
        ahead = _read_ahead(self._read, [sample for _, sample in pictures])
        bar = tqdm(ahead, "latents", len(pictures), leave=False, disable=count.silent)
        try:
            for (number, _), (sample, content) in zip(pictures, bar, strict=True):
                if isinstance(content, ImageError):
                    detail = str(content).removeprefix(f"{sample.name}: ")
                    findings[number] = Problem(sample.name, "picture cannot be read", detail)
                else:
                    findings[number] = self._add_latents(sample, *content)
                count.step()
        finally:
            self._latents.flush()
        return findings

    def _encode_lacking(
        self,
        captions: Sequence[str],
        names: dict[str, str],
        numbered: Sequence[tuple[int, Sample]],
        findings: dict[int, str | Problem],
        count: "_Counter",
    ) -> None:
        """Encodes what other ranks have encoded onto a disk that this one does not see. Raises DatasetError."""
        self._features.refresh()
        self._latents.refresh()
        self._encode_captions([text for text in captions if caption_key(text) not in self._features], names, count)
        keys = {number: finding for number, finding in findings.items() if isinstance(finding, str)}
        lacking = [(n, sample) for n, sample in numbered if n in keys and keys[n] not in self._latents]
        for number, found in self._encode_pictures(lacking, count).items():
            if found != keys[number]:
                raise DatasetError(f"{found}: another rank has read another file. Give all ranks the same data set.")

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

    def __init__(self, total: int, on_progress: OnProgress | None, *, silent: bool):
        """`silent`: no bars on the terminal."""
        self._done, self._total, self.silent = 0, total, silent
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
