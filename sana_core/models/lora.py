"""Low-rank adaptation (arXiv:2106.09685): what a LoRA file adds to the weights, whoever wrote it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sana import SanaTransformer


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank addition to one weight, or to some rows of it: those of q, k or v where the three are one weight."""

    key: str  # official name of the weight
    rows: tuple[int, int] | None  # the first of them and how many; None: all
    down: Tensor  # [rank, ...], flattened [rank, inputs], the kernel of a convolution among the inputs
    up: Tensor  # [outputs, rank], or with trailing ones
    scale: float = 1.0  # alpha / rank

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """scale * up @ down, float32 [outputs, inputs]."""
        up, down = (factor.to(device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return self.scale * (up @ down)


@torch.no_grad()
def apply_lora(model: SanaTransformer, layers: Iterable[LoraLayer], strength: float = 1.0) -> None:
    """Add the layers to the model's weights, in place: computed in float32, rounded once to the weights' dtype.

    Rounding makes the opposite strength restore them only about; load the model again to be rid of a LoRA.

    Args:
        strength: factor of the additions; may be negative.

    Raises:
        ValueError: the strength is not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"The strength of a LoRA is {strength}, expected a finite number such as 1.0.")
    for layer in layers:
        weight = model.get_parameter(layer.key)
        if layer.rows is not None:
            weight = weight.narrow(0, *layer.rows)
        weight.copy_(weight.float() + strength * layer.delta(weight.device).view_as(weight))
