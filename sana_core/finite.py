"""NaN and infinity are reported where they arise, instead of as a black picture."""

import torch
from torch import Tensor


def require_finite(tensor: Tensor, stage: str) -> Tensor:
    """Return the tensor; raise FloatingPointError that names the stage when it holds NaN or infinity."""
    if torch.isfinite(tensor).all():
        return tensor
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    raise FloatingPointError(
        f"{stage} returned NaN or infinity in {bad} of {tensor.numel()} values ({tensor.dtype}). Most often the dtype "
        "is too narrow for the weights: use bfloat16 or float32. Else the file is damaged"
    )
