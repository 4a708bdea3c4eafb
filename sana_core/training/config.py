"""What a training run is told: how long, how fast, with what."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("constant", "cosine", "linear")

# What may differ when a run goes on: how long, how fast, and what is shown of it. All else would be another run.
MAY_CHANGE = {
    "steps", "learning_rate", "schedule", "warmup_steps", "decay_steps", "accumulation", "compile", "save_every",
    "keep", "log_every", "validate_every", "sample_every", "tensorboard",
}  # fmt: skip

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. `lora` and `full` give the usual ones of each kind of training."""

    steps: int  # updates of the weights
    learning_rate: float
    optimizer: str = "adamw"  # a name of optimizers.OPTIMIZERS
    weight_decay: float = 0.0
    schedule: str = "constant"  # what follows the warm-up; "cosine" and "linear" end at zero
    warmup_steps: int = 100  # linear from zero
    decay_steps: int | None = None  # the last steps, in which the rate falls; None: all after the warm-up
    accumulation: int = 1  # batches of each rank to an update
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # of the weights' moving average; 0: none is kept
    precision: str = "bf16"  # of the computation; the trained weights are float32 in any case
    compile: bool = False  # torch.compile of each transformer block
    save_every: int = 250  # steps
    keep: int = 2  # saved states that stay
    log_every: int = 10  # steps
    validate_every: int = 0  # steps; 0: never
    sample_every: int = 0  # steps; 0: never
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulation", "save_every", "keep", "log_every"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("warmup_steps", "validate_every", "sample_every", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a number above 0")
        self._require("decay_steps", self.decay_steps is None or self.decay_steps >= 0, "0 or more, or None")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 (none), or below 1, such as 0.999")
        if self.precision == "fp16":
            raise ValueError("precision is 'fp16', in which training Sana runs into NaN; choose 'bf16' or 'fp32'.")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}.")

    @classmethod
    def lora(cls, steps: int, **changes) -> "TrainConfig":
        """Settings to train a LoRA with."""
        return cls(steps, **{"learning_rate": usual_rate("lora", **changes), "max_grad_norm": 1.0, **changes})

    @classmethod
    def full(cls, steps: int, **changes) -> "TrainConfig":
        """Settings to train all weights with; the gradient is clipped as in the official configurations."""
        return cls(steps, **{"learning_rate": usual_rate("full", **changes), "max_grad_norm": 0.1, **changes})


def usual_rate(mode: str, optimizer: str = "adamw", **_) -> float:
    """The learning rate where none is asked for; Prodigy finds its own, and the rate is a factor of that."""
    return 1.0 if optimizer == "prodigy" else {"lora": 1e-4, "full": 2e-5}[mode]


def fixed_settings(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same from start to end of a run.

    Args:
        identity: what the run is about apart from `config`: base model, rank, data, objective; values that JSON has.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(settings | identity))  # as it comes back from the disk


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that is not what it was."""
    absent = object()
    return [
        f"{name}: {_change(saved.get(name, 'absent'), now.get(name, 'absent'))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, absent) != now.get(name, absent)
    ]


def _change(before: object, after: object) -> str:
    if all(isinstance(value, str) and _HASH.fullmatch(value) for value in (before, after)):
        return "its content is not what the run was begun with"
    return f"{before!r} -> {after!r}"
