"""A run and its folder: resuming from the newest saved state, saving the next one, also on a disk that was full."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .average import Average, trained_tensors
from .config import TrainConfig, differences
from .distributed import Single
from .state import newest_state, remove_partial, save_state

logger = logging.getLogger(__name__)

_RANDOM = "random.pt"


class Run:
    """What is saved of a run."""

    def __init__(
        self,
        folder: Path,
        ranks: Single,
        model: nn.Module,
        average: Average,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        settings: dict,
    ):
        """`settings` must be those that a saved state was made with; see `config.fixed_settings`."""
        self._folder, self._ranks = folder, ranks
        self._model, self._average, self._optimizer = model, average, optimizer
        self._config, self._settings = config, settings
        self._saved = 0  # steps
        self._next_save = 0

    @torch.no_grad()
    def resume(self, source) -> tuple[int, int]:
        """Takes over the newest saved state. Returns how many steps are done, and the source's next step.

        Raises:
            ValueError: the state was made with other settings; the message lists them.
        """
        if self._ranks.rank == 0:
            remove_partial(self._folder)
        found = self._ranks.gather(newest_state(self._folder) if self._ranks.rank == 0 else None)[0]
        if found is None:
            self._next_save = self._config.save_every
            return 0, 0
        folder, progress = found
        self._refuse_changes(progress["settings"])
        self._ranks.load(folder, self._tensors(), self._model, self._optimizer)
        random = torch.load(folder / _RANDOM, weights_only=True)
        torch.set_rng_state(random["cpu"])
        if self._ranks.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self._ranks.device)
        logger.info("Resuming from %s", folder)
        self._saved = progress["step"]
        self._next_save = self._after(self._saved)
        if self._saved >= self._config.steps and self._ranks.rank == 0:
            logger.warning(
                "%s has %d steps already, %d were asked for: nothing is left to train. Ask for more steps to go on, or "
                "name another folder to start a new run.", self._folder, self._saved, self._config.steps
            )  # fmt: skip
        if progress["world_size"] == self._ranks.world_size:
            return progress["step"], progress["position"]
        return progress["step"], source.step_after(progress["samples"])

    def due(self, step: int) -> bool:
        """Whether a state is to be saved after so many steps."""
        return step >= self._next_save

    def save(
        self, step: int, position: int, source, export: Callable[[nn.Module, int, Path], None] | None, *, must: bool
    ) -> bool:
        """Saves the state, unless this step's is saved; returns whether it is.

        Where the disk is full the older states stay, and after a tenth of the usual steps it is tried again; but
        raises OSError where it `must` be now.
        """
        if step == self._saved:
            return True
        progress = {
            "step": step,
            "position": position,
            "samples": source.samples_before(position),
            "world_size": self._ranks.world_size,
            "settings": self._settings,
        }

        def write(folder: Path) -> None:
            self._ranks.save(folder, self._tensors(), self._model, self._optimizer)
            if self._ranks.rank == 0:
                random = {"cpu": torch.get_rng_state()}
                if self._ranks.device.type == "cuda":
                    random["cuda"] = torch.cuda.get_rng_state(self._ranks.device)
                torch.save(random, folder / _RANDOM)
            if export is not None:
                with self._average.applied() as averaged:
                    export(averaged, step, folder)

        try:
            save_state(self._folder, step, write, progress, keep=self._config.keep, group=self._ranks)
        except OSError as error:
            if must:
                raise OSError(
                    error.errno, f"the state of step {step} could not be saved in {self._folder} ({error}). "
                    f"The newest one there is of step {self._saved}. Make space and start the same command again"
                ) from error  # fmt: skip
            self._next_save = step + max(1, self._config.save_every // 10)
            logger.warning("Step %d could not be saved (%s); again at step %d", step, error, self._next_save)
            return False
        self._saved, self._next_save = step, self._after(step)
        return True

    def _after(self, step: int) -> int:
        every = self._config.save_every
        return (step // every + 1) * every

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": trained_tensors(self._model), "average": self._average.tensors}

    def _refuse_changes(self, saved: dict) -> None:
        changes = differences(saved, self._settings)
        if changes:
            raise ValueError(
                f"{self._folder} holds a run with other settings:\n  " + "\n  ".join(changes) + "\n"
                "Use the same settings to go on with it, or another folder to start a new run."
            )
