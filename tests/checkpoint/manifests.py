"""Keys and shapes of every published checkpoint, from tests/fixtures/checkpoints.json.gz."""

import gzip
import json
import re
from functools import cache
from pathlib import Path

import torch

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoints.json.gz"
LAYOUTS = ("official", "diffusers")


@cache
def facts() -> dict:
    """The whole fixture; its "about" says how keys are folded."""
    return json.loads(gzip.decompress(FIXTURE.read_bytes()))


def unfold(folded: dict) -> dict[str, torch.Tensor]:
    """A state dict on the meta device."""
    return {
        fill(template, numbers): torch.empty(shape, device="meta")
        for template, entries in folded.items()
        for shape, keys in entries
        for numbers in keys
    }


def fill(template: str, numbers: list[int]) -> str:
    numbers = iter(numbers)
    return re.sub("#", lambda _: str(next(numbers)), template)


def state_dict(kind: str, name: str, layout: str) -> dict[str, torch.Tensor]:
    """Keys and shapes of one published file. `kind`: "transformer", "controlnet" or "dc_ae"."""
    return unfold(facts()[kind][name][layout])


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


TRANSFORMERS = tuple(facts()["transformer"])
CONTROLNETS = tuple(facts()["controlnet"])
DC_AES = tuple(facts()["dc_ae"])
