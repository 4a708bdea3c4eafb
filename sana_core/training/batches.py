"""Which samples make up the batch of which step: a function of seed and epoch, the same on all ranks.

In each epoch every bucket is shuffled and cut into global batches of batch size x world size, and the batches of all
buckets are shuffled. A bucket's last batch is kept though it is smaller. Where the ranks would get unequal shares of
it, samples of the bucket are repeated until the shares are equal, world size - 1 of them at most: so every rank has
the same number of batches of the same size, no rank waits for another, and each weighs the same in the gradient.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batch import Batch
from .cache import Cache, CachedSample, fingerprint
from .captions import OFFICIAL_CHOICE, CaptionChoice


class GlobalBatch(NamedTuple):
    """What all ranks train on in one step."""

    indices: tuple[int, ...]  # of samples
    repeated: int  # how many at the end are there to fill it


class Batches:
    """The batches of one rank, by the number of the step."""

    def __init__(
        self,
        samples: Sequence[CachedSample],
        cache: Cache,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        choice: CaptionChoice = OFFICIAL_CHOICE,
    ):
        """`samples` are those that `cache.fill` returned, and the same on all ranks; `batch_size` is of one rank."""
        if not samples:
            raise ValueError("there are no samples to train on")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch size {batch_size}, rank {rank} of {world_size}: no such share of a batch")
        self.samples = tuple(samples)
        self.fingerprint = fingerprint(samples)
        self._cache, self._seed, self._choice = cache, seed, choice
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def __len__(self) -> int:
        """Batches in an epoch, the same on all ranks."""
        return len(self._plan(0))

    @property
    def null_features(self) -> Tensor:
        """Features [L, C], float32, of the caption that takes the place of dropped ones; all positions attend."""
        return self._cache.null_features.float()

    def indices(self, step: int) -> tuple[int, ...]:
        """Which of `samples` are in this rank's batch of the step, counted from the start of training."""
        epoch, position = divmod(step, len(self))
        return self._plan(epoch)[position].indices[self._rank :: self._world_size]

    def batch(self, step: int) -> Batch:
        """This rank's batch of the step, on the CPU. Raises OSError where the cache cannot be read any more."""
        samples = [(index, self.samples[index]) for index in self.indices(step)]
        features = [self._features(step, index, sample) for index, sample in samples]
        lengths = torch.tensor([len(rows) for rows in features])
        embeds = pad_sequence(features, batch_first=True)
        return Batch(
            latents=torch.stack([self._cache.latents(sample) for _, sample in samples]),
            embeds=embeds,
            mask=torch.arange(embeds.shape[1]) < lengths[:, None],
            names=tuple(sample.name for _, sample in samples),
        )

    def samples_before(self, step: int) -> int:
        """How many samples all ranks have seen together before the step, those repeated to fill a batch left out."""
        epoch, position = divmod(step, len(self))
        return epoch * len(self.samples) + sum(map(_fresh, self._plan(epoch)[:position]))

    def step_after(self, samples: int) -> int:
        """The first step before which at least so many samples were seen: where to resume with another world size.

        Then batches are cut differently, so a few samples of that one epoch are seen twice or not at all.
        """
        epoch, rest = divmod(samples, len(self.samples))
        step = epoch * len(self)
        for batch in self._plan(epoch):
            if rest <= 0:
                break
            rest -= _fresh(batch)
            step += 1
        return step

    def _features(self, step: int, index: int, sample: CachedSample) -> Tensor:
        chosen = self._choice.draw(sample.captions, random.Random(f"caption {self._seed} {step} {index}"))
        return self._cache.features(sample.features[chosen]).float()

    def _make_plan(self, epoch: int) -> tuple[GlobalBatch, ...]:
        rng = random.Random(f"epoch {self._seed} {epoch}")  # a string: its hash does not change from run to run
        buckets: dict[object, list[int]] = {}
        for index, sample in enumerate(self.samples):
            buckets.setdefault(sample.bucket, []).append(index)
        size = self._batch_size * self._world_size
        batches = []
        for indices in buckets.values():
            rng.shuffle(indices)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                lacking = -len(batch) % self._world_size
                batch += [indices[number % len(indices)] for number in range(lacking)]
                batches.append(GlobalBatch(tuple(batch), lacking))
        rng.shuffle(batches)
        return tuple(batches)


def _fresh(batch: GlobalBatch) -> int:
    return len(batch.indices) - batch.repeated
