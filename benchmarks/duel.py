"""One row of the training benchmark: both sides agree about loss and gradients, and then their steps take turns."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contest import CANNOT, OURS, PEER, percentiles
from benchmarks.memory import TensorWatch
from benchmarks.networks import Pair
from benchmarks.recipe import Recipe
from benchmarks.steps import Data, Job, build, narrow, parity, run_ours, seen_by_optimizer
from sana_core.training.progress import Progress

FIRST, WATCHED = 1, 2  # steps that are not timed: the first makes the optimiser's state, the next is looked at


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimiser keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


@dataclass
class Side:
    """One side's times and memory. `begin` and `end` stand around each of its steps."""

    name: str
    network: torch.nn.Module
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None
    times_ms: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    _began: float = 0.0
    _before: int = 0
    _watch: TensorWatch | None = None

    def begin(self, watched: bool = False) -> None:
        """A step begins: it is timed, or its memory is `watched`."""
        if watched and self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif watched:
            self._watch = TensorWatch(self.network)
            self._watch.leave_out(state_tensors(self.optimizer))
            self._watch.__enter__()
        self._began = self._clock()

    def end(self, watched: bool = False) -> None:
        """The step has ended."""
        if not watched:
            self.times_ms.append(1000 * (self._clock() - self._began))
            return
        self.memory = {
            "weights": total_bytes(self.network.state_dict().values()),
            "optimizer": total_bytes(state_tensors(self.optimizer)),
            "work": self._peak(),
        }

    def _peak(self) -> int:
        if self._watch is None:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        self._watch.__exit__(None, None, None)
        peak, self._watch = self._watch.peak, None
        return peak

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def record(self, batch: int) -> dict:
        """As JSON has it."""
        times = percentiles(self.times_ms)
        speed = round(1000 * batch / times["median_ms"], 4)
        rounded = [round(value, 3) for value in self.times_ms]
        return {"name": self.name, "images_per_second": speed, **times, "times_ms": rounded, "memory": self.memory}


class Duel:
    """Our loop runs, and after each of its steps, where it reports, the recipe does its own: A, B, B, A, A, B, B, A."""

    def __init__(self, job: Job, pair: Pair, device: torch.device):
        self.job, self.data = job, Data.random(job, device, job.batch)
        self.recipe = Recipe(pair.theirs, self.data.features, job.precision, job.recompute)
        self.ours = Side(OURS, pair.ours, device)
        self.theirs = Side(PEER, pair.theirs, device, self.recipe.optimizer)

    def run(self) -> None:
        """Time as many steps of each as the job has rounds."""
        steps = WATCHED + self.job.rounds

        def look(optimizer: torch.optim.Optimizer) -> None:
            if optimizer is not self.theirs.optimizer:
                self.ours.optimizer = optimizer

        with seen_by_optimizer(look):
            run_ours(self.job, self.ours.network, self.data, steps, self.after, precision=self.job.precision)

    def after(self, progress: Progress) -> None:
        """One of our steps is done."""
        done = progress.step
        if done == FIRST:
            self.recipe.step()
            self.ours.begin(watched=True)
            return
        if done == WATCHED:
            self.ours.end(watched=True)
            self.theirs.begin(watched=True)
            self.recipe.step()
            self.theirs.end(watched=True)
        else:
            self.ours.end()
            for _ in range(self.turns(done - WATCHED - 1)):
                self.theirs.begin()
                self.recipe.step()
                self.theirs.end()
        self.ours.begin()

    def turns(self, index: int) -> int:
        """How many steps the recipe does after our timed one of this index: two after each other one."""
        return 0 if index % 2 else min(2, self.job.rounds - index)


def hold(job: Job, device: torch.device) -> dict:
    """Set a job up, compare gradients, and time both sides if they agree; what JSON has of it."""
    settings = {"mode": job.mode, "batch": job.batch, "precision": job.precision, "recompute": job.recompute}
    known = {"name": job.name, "rounds": job.rounds, **settings, "failure": None, "parity": None, "contestants": []}
    try:
        pair = build(job, device)
        known["parity"] = parity(job, pair, device)
        if not known["parity"]["passed"]:
            return known
        narrow(job, pair)
        duel = Duel(job, pair, device)
        duel.run()
    except CANNOT as error:
        return known | {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return known | {"contestants": [side.record(job.batch) for side in (duel.ours, duel.theirs)]}
