"""The functions that a Sana transformer computes with, apart from its weights: one object, handed to the model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Kernels:
    """One implementation of each function that `reference` specifies."""

    linear_attention: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_depthwise: Callable[[Tensor, Tensor, Tensor], Tensor]


REFERENCE = Kernels(
    linear_attention=reference.linear_attention,
    attention=reference.attention,
    modulate=reference.modulate,
    gated_residual=reference.gated_residual,
    gated_depthwise=reference.gated_depthwise,
)
