"""What suits the processor when there is no GPU: the number format, and how many threads."""

import logging
import math
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

LEAST_WEIGHTS = 100_000_000  # of a network that is slow on a processor; smaller ones draw the same picture on each
_QUOTAS = (  # of Linux control groups, by which containers limit processor time: microseconds, and of how many
    ("cpu.max",),
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32: by AMX, which multiplies matrices.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` does not tell: it is true as well where bfloat16 is emulated, which
    takes longer than float32. AVX-512's dot products of bfloat16 do not help: blocks of the 0.6B model run at 3.1 to
    3.4 times float32's speed with AMX, and at 0.7 times on the same processor without (torch 2.11, one thread).
    """
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe()


def early_dtype(device: torch.device, asked: torch.dtype | None) -> torch.dtype | None:
    """The format as far as it is known before a file was read: what was asked for, else float32 where nothing else is.

    Says so where bfloat16 was asked for and is slow.
    """
    if device.type != "cpu" or multiplies_bfloat16():
        return asked
    if asked == torch.bfloat16:
        log.warning("this CPU emulates bfloat16: float32 is faster")
    return asked or torch.float32


def fast_dtype(weights: int, trained: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The format for a network of so many weights on the processor: bfloat16 where it is fast and precise enough.

    `trained`: what the network was trained in; float16 has more digits than bfloat16.
    """
    narrow = trained == torch.bfloat16 and weights >= LEAST_WEIGHTS and multiplies_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


def count_weights(model: torch.nn.Module) -> int:
    """How many numbers a network has."""
    return sum(parameter.numel() for parameter in model.parameters())


def limit_threads(groups: Path = Path("/sys/fs/cgroup")) -> None:
    """Keep PyTorch's threads, one a core by default, to the cores' worth of time that a container may use.

    More threads than that wait for each other: the container stops all of them when its time is used up.
    """
    threads = min([torch.get_num_threads(), *_quotas(groups)])
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def _quotas(groups: Path) -> list[int]:
    found = []
    for names in _QUOTAS:
        try:
            quota, period = " ".join((groups / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            found.append(max(1, math.ceil(int(quota) / int(period))))
    return found
