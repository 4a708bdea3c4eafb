"""The training loop: one function, the same for every model that the project trains."""

import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .state import load_newest_state, save_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup_steps: int = 100  # linear from zero
    decay_steps: int = 0  # linear to zero, at the end
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    save_every: int = 250  # steps
    log_every: int = 20  # steps
    seed: int = 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the step: warm-up, constant, decay."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (config.steps - step) / max(1, config.decay_steps))
    return config.learning_rate * min(warmup, decay)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, on the CPU: a resumed run draws what the unbroken one would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, for parameters and buffers."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int, torch.Generator], Tensor],
    config: TrainConfig,
    run: Path,
    on_save: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> nn.Module:
    """Trains `model` in place with AdamW; the same call on the same folder resumes bit-exactly.

    Args:
        model: float32 weights.
        loss_of: loss of (model, step, generator of the step's randomness).
        config: length and rates; `steps` may grow from one call to the next.
        run: folder for the saved states and `log.jsonl`.
        on_save: measures the averaged model after each save; what it returns goes to the log.

    Returns:
        The exponential moving average of the model, in eval mode.
    """
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    first_step = 0
    if (state := load_newest_state(run)) is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    run.mkdir(parents=True, exist_ok=True)
    start, smoothed = time.monotonic(), None
    progress = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, desc=run.name)
    for step in progress:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = loss_of(model, step, step_generator(config.seed, step))
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if torch.isfinite(grad_norm):
            optimizer.step()
        else:
            logger.warning("Step %d left out: its gradient is not finite (loss %s)", step, loss.item())
        optimizer.zero_grad(set_to_none=True)
        update_ema(average, model, min(config.ema_decay, (1 + step) / (10 + step)))

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            value = loss.item()
            smoothed = value if smoothed is None else 0.9 * smoothed + 0.1 * value
            progress.set_postfix(loss=f"{smoothed:.4f}")
            _log(run, step=done, loss=value, grad_norm=grad_norm.item(), seconds=time.monotonic() - start)
        if done % config.save_every == 0 or done == config.steps:
            save_state(
                run,
                done,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                },
            )
            if on_save is not None:
                _log(run, step=done, **on_save(average, done))
    return average


def _log(run: Path, **record: float) -> None:
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
