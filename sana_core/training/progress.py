"""What a run shows of itself: a progress bar, a line of JSON for each logged step, and TensorBoard where asked."""

import importlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..checkpoint.files import atomic_path

LOG = "log.jsonl"
_SMOOTHING = 0.9  # of the loss, for each step


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step."""

    step: int  # how many are done
    steps: int
    loss: float
    smoothed_loss: float
    learning_rate: float
    grad_norm: float  # before clipping
    images_per_second: float  # of all ranks, since the run was started or resumed
    seconds_left: float


class Reporter:
    """Counts the steps of a run and writes them down; on all ranks but the first it only counts."""

    def __init__(self, run: Path, first_step: int, steps: int, *, writes: bool, tensorboard: bool):
        self._run, self._steps, self._writes = run, steps, writes
        self._first, self._start, self._images, self._smoothed = first_step, time.monotonic(), 0, None
        self._board = tensorboard_writer(run) if tensorboard and writes else None
        self._bar = tqdm(initial=first_step, total=steps, desc=run.name, disable=not writes)
        if writes:
            _forget_after(run / LOG, first_step)

    def advance(self, step: int, loss: float, grad_norm: float, rate: float, images: int) -> Progress:
        """Takes in a step: `step` are done, the last on so many images."""
        self._images += images
        self._smoothed = loss if self._smoothed is None else _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = seconds / (step - self._first) * (self._steps - step)
        self._bar.update()
        self._bar.set_postfix(loss=f"{self._smoothed:.4f}", lr=f"{rate:.2e}", refresh=False)
        return Progress(step, self._steps, loss, self._smoothed, rate, grad_norm, self._images / seconds, left)

    def log(self, progress: Progress) -> None:
        """Writes the step down."""
        self.write(progress.step, {name: value for name, value in asdict(progress).items() if name != "step"})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers of this step down."""
        if not self._writes or not values:
            return
        with open(self._run / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()


def tensorboard_writer(run: Path):
    """A writer of TensorBoard's files in the run's folder. Raises ValueError where the package is missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(run / "tensorboard")
    except ImportError as error:
        raise ValueError(
            f"TensorBoard's files need a package that cannot be imported ({error}). Install it with: "
            "pip install tensorboard; or leave the option off: log.jsonl holds the same."
        ) from error


def read_losses(run: Path) -> list[float]:
    """The loss of each logged step of a run so far, in their order; none where nothing was trained yet."""
    log = run / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def _forget_after(log: Path, step: int) -> None:
    """Leaves out what a run logged after the state that it resumes from, and a line that was cut off by a kill."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_path(log) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
