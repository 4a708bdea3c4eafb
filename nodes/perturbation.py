"""Perturbed predictions in one call with those that they are compared with: what both have in common runs once.

Sampling asks for the positive conditioning a second time, in a list of conditionings of its own. Core batches that
list as it batches every other, in any order and in as many calls as memory wants; here each call is put in order, so
that the transformer gets as rows to copy what it would otherwise predict twice from the start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.model_patcher
import torch
from torch import Tensor

from ..sana_core.models.controlnet import Control
from ..sana_core.models.sana import Perturbation

PERTURBED = "sana_perturbed"  # in transformer_options: the PerturbedList of the call
PERTURBATION = "sana_perturbation"  # in transformer_options: the Perturbation of the transformer, whose x has its rows


@dataclass(frozen=True)
class PerturbedList:
    """Which of the lists of conditionings repeats the first one, and the blocks that are perturbed for it."""

    index: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Chunks of a batch, one a conditioning, that run together."""

    chunks: tuple[int, ...]  # their places in the batch
    copies: int = 0  # how many of the last are perturbed copies of as many before them
    perturbed: bool = False  # whether all are perturbed, and none a copy


def split(lists: Sequence[int], ids: Sequence, perturbed: int) -> list[Part]:
    """The parts of a batch of conditionings, given the list that each comes from and its id.

    A chunk of the perturbed list copies the chunk of list 0 with its id. Where core put that in another call, it runs
    on its own from the start.
    """
    originals = {ids[place]: place for place, number in enumerate(lists) if number == 0}
    copies, alone, others = [], [], []
    for place, number in enumerate(lists):
        if number != perturbed:
            others.append(place)
        elif ids[place] in originals:
            copies.append(place)
        else:
            alone.append(place)
    copied = [originals[ids[place]] for place in copies]
    kept = [place for place in others if place not in copied]
    parts = [Part((*kept, *copied, *copies), len(copies)), Part(tuple(alone), perturbed=True)]
    return [part for part in parts if part.chunks]


def attend_to_themselves(model_options: dict, layers: Sequence[int]) -> dict:
    """A copy of the model's options by which positions attend to themselves alone in these blocks."""
    options = model_options.copy()
    for layer in layers:
        options = comfy.model_patcher.set_model_options_patch_replace(options, _identity, "attn1", "block", layer)
    return options


def _identity(q, k, v, extra_options):
    return v


class Rows:
    """The rows of a part: picks them from the arguments of a call, and puts results back in their places."""

    def __init__(self, part: Part, options: dict, count: int):
        """`options`: transformer_options of the call, whose batch has `count` rows."""
        self.part = part
        self.options = options
        self.count = count
        self.chunks = len(options["cond_or_uncond"])
        self.kept = part.chunks[: len(part.chunks) - part.copies]

    def all(self, value: Tensor) -> Tensor:
        """Rows of what the sampler gives, such as the latents: the copies too."""
        return self._pick(value, self.part.chunks)

    def inputs(self, value):
        """Rows of what the transformer reads: of tensors with a row for each of the batch, without the copies."""
        has_rows = torch.is_tensor(value) and value.ndim > 0 and len(value) == self.count
        return self._pick(value, self.kept) if has_rows else value

    def ids(self, ids: Sequence) -> tuple:
        """What there is one of for each conditioning."""
        return tuple(ids[place] for place in self.kept)

    def control(self, one: Control) -> Control:
        """The ControlNet for the rows that the transformer reads."""
        return one if len(one.hint) == 1 else replace(one, hint=self.inputs(one.hint))

    def transformer_options(self, layers: tuple[int, ...]) -> dict:
        """The options of the call for this part, with what perturbs it."""
        options = {**self.options}
        for name in ("cond_or_uncond", "uuids"):
            options[name] = list(self.ids(options[name]))
        if self.part.perturbed:
            return attend_to_themselves({"transformer_options": options}, layers)["transformer_options"]
        if self.part.copies:
            options[PERTURBATION] = Perturbation(layers, self.part.copies * self.count // self.chunks)
        return options

    def _pick(self, value: Tensor, places: Sequence[int]) -> Tensor:
        chunks = value.chunk(self.chunks)
        return torch.cat([chunks[place] for place in places])


def predict_parts(
    perturbed: PerturbedList, options: dict, count: int, predict: Callable[[Rows, dict], Tensor]
) -> Tensor:
    """Predictions for a batch of `count` rows by `predict(rows, transformer_options)`, called for each of its parts."""
    results = {}
    for part in split(options["cond_or_uncond"], options["uuids"], perturbed.index):
        rows = Rows(part, options, count)
        found = predict(rows, rows.transformer_options(perturbed.layers))
        results.update(zip(part.chunks, found.chunk(len(part.chunks)), strict=True))
    return torch.cat([results[place] for place in sorted(results)])
