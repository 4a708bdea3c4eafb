"""NaN and infinity are reported where they arise, instead of as a black picture."""

import torch
from torch import Tensor


def require_finite(tensor: Tensor, stage: str) -> Tensor:
    """Return the tensor; raise FloatingPointError that names the stage when it holds NaN or infinity."""
    if torch.isfinite(tensor).all():
        return tensor
    raise _not_finite(stage, int(torch.isfinite(tensor).sum()), tensor.numel(), tensor.dtype)


class FiniteSteps:
    """Finds the first of many steps whose result holds NaN or infinity, without a wait for the GPU at each of them."""

    def __init__(self, stage: str):
        """`stage`: what takes the steps, for the message."""
        self._stage = stage
        self._steps = 0
        self._counts: list[tuple[str, Tensor, int, torch.dtype]] = []

    def watch(self, tensor: Tensor) -> Tensor:
        """Return the next step's result. On a CPU, where nothing waits, it is checked at once."""
        self._steps += 1
        stage = f"{self._stage} at step {self._steps}"
        if tensor.device.type == "cpu":
            return require_finite(tensor, stage)
        self._counts.append((stage, torch.isfinite(tensor).sum(), tensor.numel(), tensor.dtype))
        return tensor

    def check(self) -> None:
        """Raise FloatingPointError that names the first bad step of those watched; waits for all of them."""
        counts, self._counts = self._counts, []
        if not counts:
            return
        finite = torch.stack([count for _, count, _, _ in counts]).tolist()
        for (stage, _, values, dtype), count in zip(counts, finite, strict=True):
            if count < values:
                raise _not_finite(stage, count, values, dtype)


def _not_finite(stage: str, finite: int, values: int, dtype: torch.dtype) -> FloatingPointError:
    return FloatingPointError(
        f"{stage} returned NaN or infinity in {values - finite} of {values} values ({dtype}). Most often the dtype is "
        "too narrow for the weights: use bfloat16 or float32. Else the file is damaged"
    )
