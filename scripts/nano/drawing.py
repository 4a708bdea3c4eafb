"""Batches for the training loop that are drawn anew at each step and never end."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawnBatch:
    """Tensors of one step, and what to call each sample in messages."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> "DrawnBatch":
        return DrawnBatch(tuple(tensor.to(device) for tensor in self.tensors), self.names)


class DrawnBatches:
    """The training loop's source."""

    def __init__(self, draw: Callable[[np.random.Generator, int], DrawnBatch], size: int):
        """`draw` makes a batch of about `size` samples from its randomness and the step."""
        self._draw, self._size = draw, size

    def batch(self, step: int) -> DrawnBatch:
        return self._draw(np.random.default_rng((0, step)), step)

    def samples_before(self, step: int) -> int:
        return step * self._size

    def step_after(self, samples: int) -> int:
        return -(-samples // self._size)
