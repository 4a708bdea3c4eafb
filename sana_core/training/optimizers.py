"""Optimisers by name, from torch or from the libraries that keep them, and the learning rate of each step."""

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import nn

from .config import TrainConfig

Factory = Callable[[Iterable[nn.Parameter], float, float], torch.optim.Optimizer]  # parameters, rate, weight decay


def _adamw() -> Factory:
    return lambda parameters, rate, decay: torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)


def _adamw8bit() -> Factory:
    try:
        library = importlib.import_module("bitsandbytes").optim
    except ImportError:
        library = _library("torchao.optim", "adamw8bit", "bitsandbytes (or torchao)")
    return lambda parameters, rate, decay: library.AdamW8bit(parameters, lr=rate, weight_decay=decay)


def _came() -> Factory:
    library = _library("came_pytorch", "came", "came-pytorch")
    settings = {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}  # the official configurations'
    return lambda parameters, rate, decay: library.CAME(parameters, lr=rate, weight_decay=decay, **settings)


def _adafactor() -> Factory:
    return lambda parameters, rate, decay: torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)


def _prodigy() -> Factory:
    library = _library("prodigyopt", "prodigy", "prodigyopt")
    return lambda parameters, rate, decay: library.Prodigy(
        parameters, lr=rate, weight_decay=decay, decouple=True, safeguard_warmup=True
    )


OPTIMIZERS = {"adamw": _adamw, "adamw8bit": _adamw8bit, "came": _came, "adafactor": _adafactor, "prodigy": _prodigy}


def _library(module: str, name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"The optimizer {name!r} needs a package that cannot be imported ({error}). "
            f"Install it with: pip install {package}; or choose 'adamw'."
        ) from error


def optimizer_factory(name: str) -> Factory:
    """What makes the optimiser of this name. To be called before models are loaded, since it may not be there.

    `prodigy` finds the rate by itself: its learning rate is a factor, and 1 is usual.

    Raises:
        ValueError: an unknown name, or a library that is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"The optimizer {name!r} is unknown, expected one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives all parameters this learning rate, in place where it is a tensor, as torchao's optimisers have it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the step, counted from 0: linear warm-up, constant, then the schedule's fall to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warmup
    span = config.steps - config.warmup_steps if config.decay_steps is None else config.decay_steps
    left = min(1.0, max(0.0, (config.steps - step) / max(1, span)))
    fall = left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * min(warmup, fall)
