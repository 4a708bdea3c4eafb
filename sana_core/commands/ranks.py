"""One process among several that share a command's work: on the GPUs of a machine, or on several machines.

`torchrun` sets the environment variables that are read here, and so do other launchers that follow it.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=30)  # for the slowest process: its share may hold the larger pictures


@dataclass(frozen=True)
class Rank:
    """Which of `count` processes this one is, from 0."""

    index: int
    count: int

    def share(self, work: list | tuple) -> list | tuple:
        """Every count-th piece. It depends on nothing that changes meanwhile, so that the shares never overlap."""
        return work[self.index :: self.count]


def own_rank() -> Rank:
    """This process's place, from RANK and WORLD_SIZE; the only one if there are none."""
    rank = Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= rank.index < rank.count:
        raise ValueError(f"RANK is {rank.index} and WORLD_SIZE {rank.count}: expected 0 <= RANK < WORLD_SIZE")
    return rank


def own_device(device: torch.device | None) -> torch.device | None:
    """A GPU for each process of a machine, unless `device` names another one; more processes than GPUs share them."""
    left_open = device is None or (device.type == "cuda" and device.index is None)
    if not left_open or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def gather(rank: Rank, result: object) -> list:
    """The results of all processes, in each of them, once the last one is done.

    A launcher ends all processes as soon as one of them fails, so none may do so before the others are done. Processes
    that were started by hand, without MASTER_ADDR to meet at, have only their own result.
    """
    if rank.count == 1 or "MASTER_ADDR" not in os.environ:
        return [result]
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        results = [None] * rank.count
        dist.all_gather_object(results, result)
    finally:
        dist.destroy_process_group()
    return results


def require_one_process() -> None:
    """Raise ValueError among several processes: prompts on the command line are not shared."""
    rank = own_rank()
    if rank.count > 1:
        raise ValueError(f"{rank.count} processes cannot share --prompt: give the prompts as --txt-file or --json-file")
