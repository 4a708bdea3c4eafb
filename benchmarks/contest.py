"""One row of the benchmark: contestants do the same work, agree about its result, and are timed in turns.

Who disagrees is not timed, so that no speed stands beside a wrong result.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import TensorWatch, weights_of

OURS, PEER = "ours", "diffusers"
LARGEST, RMS = "largest difference / largest value", "RMS of the difference / RMS of the value"
ROUNDING_SLACK = 1.1  # how much further off than diffusers a result may be
GPU_WARM_UPS = 3
CANNOT = (ArithmeticError, RuntimeError, ValueError)  # torch.OutOfMemoryError is a RuntimeError


def nothing() -> None:
    """What most contestants have to do before a call."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    run: does it once, and returns its result; this is what is timed.
    prepare: called before each run, and not timed.
    networks: whose weights the work needs.
    warm: which caches are filled when it is timed.
    """

    name: str
    run: Callable[[], Tensor]
    networks: tuple[nn.Module, ...]
    warm: str = "none"
    prepare: Callable[[], None] = nothing

    def call(self) -> Tensor:
        """Prepare and run, without progress bars."""
        self.prepare()
        with contextlib.redirect_stderr(io.StringIO()):
            return self.run()


@dataclass(frozen=True)
class Contest:
    """Who competes, and what makes results agree.

    contestants: ours and diffusers' among them, under `OURS` and `PEER`.
    truth: diffusers' work in a wider format than the contestants': their RMS error against it must not be above
        `ROUNDING_SLACK` times diffusers' own.
    limit: without a truth, the largest difference to diffusers' result, as a share of the largest value.
    """

    contestants: Sequence[Contestant]
    limit: float = 0.0
    truth: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: what is done, how often it is timed, and what sets it up."""

    name: str
    build: Callable[[], Contest]
    rounds: int


@dataclass
class Entry:
    """What is known of a contestant in a row."""

    contestant: Contestant
    first_call_s: float = 0.0
    failure: str | None = None
    parity: float | None = None
    passed: bool | None = None  # None: it is what others are compared with, or it failed
    memory: dict[str, int] = field(default_factory=dict)
    kernels: int | None = None
    times_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def may_be_timed(self) -> bool:
        """Whether its result is right."""
        return self.failure is None and self.passed is not False

    def record(self) -> dict:
        """As JSON has it; without times where the result is wrong."""
        known = {
            "name": self.contestant.name,
            "warm": self.contestant.warm,
            "parity": self.parity,
            "passed": self.passed,
            "failure": self.failure,
        }
        if not self.times_ms:
            return known
        return known | {
            **percentiles(self.times_ms),
            "times_ms": [round(value, 4) for value in self.times_ms],
            "host_ms": percentiles(self.host_ms)["median_ms"],
            "first_call_s": round(self.first_call_s, 3),
            "kernels": self.kernels,
            "memory": self.memory | {"weights": sum(map(weights_of, self.contestant.networks))},
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, linear between values."""
    middle, low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9]).double())
    return {"median_ms": round(middle.item(), 4), "p10_ms": round(low.item(), 4), "p90_ms": round(high.item(), 4)}


def turns(contestants: Sequence, rounds: int) -> Iterator:
    """A-B-B-A-A-B...: each once a round, so that a machine that slows down does so for all."""
    for index in range(rounds):
        yield from contestants if index % 2 == 0 else reversed(contestants)


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value; NaN where anything is not a number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def rms_difference(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference as a share of the RMS of what is expected."""
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@torch.no_grad()
def hold(row: Row, device: torch.device) -> dict:
    """Set a row up, compare results, and time whoever agrees; what JSON has of it."""
    known = {"name": row.name, "rounds": row.rounds, "failure": None, "parity": None, "contestants": []}
    try:
        contest = row.build()
        entries = [Entry(contestant) for contestant in contest.contestants]
        rule = judge(entries, contest)
    except CANNOT as error:  # no inputs, or nothing to compare with
        return known | {"failure": _say(error)}
    for entry in entries:
        if entry.may_be_timed:
            _attempt(entry, partial(_observe, entry, device))
    for entry in turns([entry for entry in entries if entry.may_be_timed], row.rounds):
        elapsed, host = timed(entry.contestant, device)
        entry.times_ms.append(elapsed)
        entry.host_ms.append(host)
    return known | {"parity": rule, "contestants": [entry.record() for entry in entries]}


def judge(entries: Sequence[Entry], contest: Contest) -> dict:
    """Call each once and note how far off its result is; returns the rule, with its limit.

    Raises one of `CANNOT` where diffusers fails.
    """
    results = {entry.contestant.name: _first_result(entry) for entry in entries}
    expected = results[PEER]
    if expected is None:
        (failure,) = (entry.failure for entry in entries if entry.contestant.name == PEER)
        raise RuntimeError(f"diffusers failed, so that there is nothing to compare with: {failure}")
    measure, limit, compare = LARGEST, contest.limit, largest_difference
    if contest.truth is not None:
        with contextlib.redirect_stderr(io.StringIO()):
            truth = contest.truth().float().cpu()
        measure, limit, compare = RMS, ROUNDING_SLACK * rms_difference(expected, truth), rms_difference
        expected = truth
    for entry in entries:
        result = results[entry.contestant.name]
        if result is not None:
            entry.parity = compare(result, expected)
            entry.passed = None if entry.contestant.name == PEER else entry.parity <= limit
    return {"measure": measure, "limit": limit}


def _first_result(entry: Entry) -> Tensor | None:
    start = time.perf_counter()
    result = _attempt(entry, lambda: entry.contestant.call().float().cpu())
    entry.first_call_s = time.perf_counter() - start
    if result is not None and not result.isfinite().all():
        entry.failure = "NaN or infinity"
        return None
    return result


def _attempt(entry: Entry, work: Callable[[], object]) -> object:
    """A contestant that cannot do the work, for want of memory perhaps, does not end the benchmark."""
    try:
        return work()
    except CANNOT as error:
        entry.failure = _say(error)
        return None


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _observe(entry: Entry, device: torch.device) -> None:
    """Warm up, and look at memory and kernels, in calls that are not timed."""
    if device.type != "cuda":
        with TensorWatch(*entry.contestant.networks) as watch:
            entry.contestant.call()
        entry.memory = {"work": watch.peak}
        return
    # The first call took the libraries' workspaces. What CUDA graphs keep counts as reserved.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(GPU_WARM_UPS):
        entry.contestant.call()
    torch.cuda.synchronize()
    entry.memory = {
        "work": torch.cuda.max_memory_allocated() - allocated,
        "reserved": torch.cuda.max_memory_reserved() - reserved,
    }
    entry.kernels = _count_kernels(entry.contestant)


def _count_kernels(contestant: Contestant) -> int:
    """What one call runs on the GPU: kernels, copies and fills."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        contestant.call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def timed(contestant: Contestant, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call, and those that the host was busy.

    On a GPU: between two events in its queue, which is empty at the start, and until the call returned. On a CPU: of
    wall time, and of the process on each thread, which is less where the machine does other things as well.
    """
    contestant.prepare()
    with contextlib.redirect_stderr(io.StringIO()):
        return _timed_cuda(contestant.run) if device.type == "cuda" else _timed_cpu(contestant.run)


def _timed_cuda(run: Callable[[], Tensor]) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    run()
    end.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return start.elapsed_time(end), 1000 * host


def _timed_cpu(run: Callable[[], Tensor]) -> tuple[float, float]:
    begin, busy = time.perf_counter(), time.process_time()
    run()
    elapsed, busy = time.perf_counter() - begin, time.process_time() - busy
    return 1000 * elapsed, 1000 * busy / torch.get_num_threads()
