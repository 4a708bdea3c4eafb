"""The functions that transformer and autoencoder compute with, apart from weights: one object, handed to the model."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import reference
from .reference import QKNorm

log = logging.getLogger(__name__)

FIRST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 and TF32 tensor cores


@dataclass(frozen=True)
class Kernels:
    """One implementation of each function that `reference` specifies."""

    linear_attention: Callable[[Tensor, Tensor, Tensor, float, QKNorm | None], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_depthwise: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


REFERENCE = Kernels(
    linear_attention=reference.linear_attention,
    attention=reference.attention,
    modulate=reference.modulate,
    gated_residual=reference.gated_residual,
    gated_depthwise=reference.gated_depthwise,
    rms_norm=reference.rms_norm,
)


def best_kernels(device: torch.device | str) -> Kernels:
    """The fused kernels where the device and its software run them, the processor's on a CPU, else the reference.

    Both leave tensors on other devices to the reference, so a model may be moved afterwards.
    """
    device = torch.device(device)
    if device.type == "cpu":
        from .processor import PROCESSOR

        return PROCESSOR
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return REFERENCE
    return _probed_kernels(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _probed_kernels(index: int) -> Kernels:
    if torch.cuda.get_device_capability(index) < FIRST_CAPABILITY:
        return REFERENCE
    try:
        # Triton compiles with tools of the machine (a C compiler, ptxas): only a launch tells whether they are there.
        from .fused import FUSED, check_on

        check_on(torch.device("cuda", index))
    except Exception as error:
        log.warning("The Triton kernels do not run here (%s: %s); PyTorch's do.", type(error).__name__, error)
        return REFERENCE
    return FUSED
