"""The training loop: one function, the same for every model that the project trains."""

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .average import Average
from .config import TrainConfig, fixed_settings
from .distributed import Single
from .lock import run_lock
from .loss import Objective, sample_generators
from .optimizers import learning_rate, optimizer_factory, set_rate
from .progress import Progress, Reporter
from .run import Run
from .stop import Stopped, StopSignals

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 3  # in a row


class Source(Protocol):
    """Where batches come from. A batch has `names`, one of each sample, and `to(device)`."""

    def batch(self, step: int):
        """This rank's batch of a step of the source, a pure function of the number."""

    def samples_before(self, step: int) -> int:
        """How many samples all ranks see before that step."""

    def step_after(self, samples: int) -> int:
        """The first step before which so many samples were seen."""


@dataclass(frozen=True)
class Hooks:
    """What else happens in a run; each is called on every rank, since a shared out model needs them all to compute.

    An exception out of `on_step`, ComfyUI's interrupt among them, ends the run after its state was saved.
    """

    on_step: Callable[[Progress], None] | None = None
    on_save: Callable[[nn.Module, int], dict[str, float]] | None = None  # after a save; the averaged model
    validate: Callable[[nn.Module], dict[str, float]] | None = None  # every `validate_every` steps; the averaged model
    sample: Callable[[nn.Module, int], None] | None = None  # every `sample_every` steps; the averaged model
    export: Callable[[nn.Module, int, Path], None] | None = None  # adds files to a state that is being written


class TrainingDiverged(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


def train(
    model: nn.Module,
    source: Source,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    *,
    ranks: Single | None = None,
    hooks: Hooks = Hooks(),
    identity: dict | None = None,
) -> nn.Module:
    """Trains what has a gradient in `model`, in place; the same call on the same folder resumes bit-exactly.

    Args:
        model: its trainable weights float32, on the ranks' device.
        source: batches of the ranks.
        objective: what is minimised.
        config: length, rates, precision.
        folder: of the run, for the saved states and `log.jsonl`.
        ranks: the processes that train together; None: this one, on the model's device.
        hooks: what else happens.
        identity: what the run is about apart from `config`, such as base model, rank and data, as JSON has it; a run
            cannot be resumed with another.

    Returns:
        The model with its averaged weights where an average is kept, in eval mode.

    Raises:
        ValueError: settings that do not fit each other, the model, or the run that is to be resumed.
        RunInUse: another process trains in this folder.
        TrainingDiverged: three steps in a row were not finite; the newest saved state is from before them.
        Stopped: by SIGINT or SIGTERM, after saving.
        OSError: the last state could not be written.
    """
    ranks = ranks or Single(next(model.parameters()).device)
    make_optimizer = optimizer_factory(config.optimizer)
    _check_trainable(model)
    with ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(run_lock(folder))
        signals = stack.enter_context(StopSignals())
        ahead = stack.enter_context(ThreadPoolExecutor(1))

        prepared = ranks.prepare(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(parameters, config.learning_rate, config.weight_decay)
        average = Average(model, config.ema_decay)
        run = Run(folder, ranks, model, average, optimizer, config, fixed_settings(config, identity or {}))
        first_step, position = run.resume(source)
        reporter = Reporter(folder, first_step, config.steps, writes=ranks.rank == 0, tensorboard=config.tensorboard)
        stack.callback(reporter.close)
        if config.compile:
            for block in model.blocks:
                block.compile()

        autocast = partial(torch.autocast, ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        bad_steps = 0
        upcoming = ahead.submit(source.batch, position)
        for step in range(first_step, config.steps):
            model.train()
            rate = learning_rate(step, config)
            set_rate(optimizer, rate)

            # forward and backward: the sum of the samples' losses, divided by their number over all ranks at the end
            loss_sum, count, seen = 0.0, 0, []
            for part in range(config.accumulation):
                batch = upcoming.result().to(ranks.device)
                position += 1
                upcoming = ahead.submit(source.batch, position)
                size = len(batch.names)
                positions = [(part * size + index) * ranks.world_size + ranks.rank for index in range(size)]
                with ranks.backward_pass(prepared, last=part == config.accumulation - 1):
                    with autocast():
                        loss = objective(prepared, batch, sample_generators(config.seed, step, positions)) * size
                    loss.backward()
                loss_sum, count = loss_sum + loss.detach(), count + size
                seen.append((batch, positions))
            stop = signals.received
            loss_sum, count, stopping = ranks.sum(float(loss_sum), count, bool(stop))
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(ranks.world_size / count)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)

            # update, unless something is not finite; loss and norm are the same on all ranks, so all decide alike
            if math.isfinite(loss_sum) and math.isfinite(grad_norm):
                optimizer.step()
                average.update(step)
                bad_steps = 0
            else:
                bad_steps += 1
                samples = "; ".join(
                    objective.describe(batch, sample_generators(config.seed, step, where)) for batch, where in seen
                )
                samples = "; ".join(ranks.gather(samples))
                what = f"loss {loss_sum / count:g}, gradient {grad_norm:g}, of {samples}"
                logger.warning("Step %d left out: not finite (%s)", step, what)
                if bad_steps == MAX_BAD_STEPS:
                    raise TrainingDiverged(
                        f"{bad_steps} steps in a row were not finite, the last with {what}. The newest state in "
                        f"{folder} is from before them. Lower the learning rate, or look at these samples."
                    )
            optimizer.zero_grad(set_to_none=True)

            # show, measure, save
            done = step + 1
            last = done == config.steps
            progress = reporter.advance(done, loss_sum / count, grad_norm, rate, int(count))
            if done % config.log_every == 0 or last:
                reporter.log(progress)
            if hooks.validate is not None and config.validate_every and (done % config.validate_every == 0 or last):
                with average.applied() as averaged, autocast():
                    reporter.write(done, hooks.validate(averaged))
            if hooks.sample is not None and config.sample_every and (done % config.sample_every == 0 or last):
                with average.applied() as averaged:
                    hooks.sample(averaged, done)
            try:
                if hooks.on_step is not None:
                    hooks.on_step(progress)
            except BaseException:
                run.save(done, position, source, hooks.export, must=True)
                raise
            if run.due(done) or last or stopping:
                saved = run.save(done, position, source, hooks.export, must=bool(last or stopping))
                if saved and hooks.on_save is not None and not stopping:
                    with average.applied() as averaged:
                        reporter.write(done, hooks.on_save(averaged, done))
            if stopping:
                raise Stopped(max(ranks.gather(stop)), done)
        return average.keep()


def _check_trainable(model: nn.Module) -> None:
    """Raises ValueError where there is nothing to train, or in a precision in which small updates are lost."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not dtypes:
        raise ValueError("The model has no trainable weights: add LoRA adapters, or unfreeze it.")
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"The trainable weights are {found}: updates would be rounded away. Load the model with dtype float32."
        )
