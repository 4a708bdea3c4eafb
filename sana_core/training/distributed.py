"""One process, several with a copy of the model each, or several that share it: the same few methods for the loop.

`torchrun` starts the processes. All of them call every method, in the same order.
"""

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.sana import SanaTransformer

WEIGHTS, SHARDS = "weights.pt", "shards"
PATIENCE = timedelta(days=30)  # with the slowest rank, while it encodes its share of the data set or draws samples


class Single:
    """One process."""

    rank, world_size = 0, 1

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def prepare(self, model: nn.Module) -> nn.Module:
        """What to call instead of the model. Its parameters may be others afterwards: make the optimiser then."""
        return model

    def backward_pass(self, prepared: nn.Module, last: bool) -> AbstractContextManager:
        """Surrounds forward and backward; gradients are averaged over the ranks in the last of a step alone."""
        return nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over the ranks, the same on all of them, in double precision."""
        return list(values)

    def gather(self, value: Any) -> list:
        """The values of all ranks, on all of them."""
        return [value]

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict, on the CPU; empty on all ranks but the first."""
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    def save(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes the tensors, by group and name, and the optimiser's state into the folder."""
        with open(folder / WEIGHTS, "wb") as file:
            torch.save({**tensors, "optimizer": optimizer.state_dict()}, file)

    def load(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Reads what `save` wrote, into the same tensors; also what ranks wrote that shared the model.

        Raises ValueError for a state that only others can read, or of another model.
        """
        if (folder / SHARDS).is_dir():
            _load_shards(folder, tensors, model, optimizer)
            return
        saved = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
        for group, members in tensors.items():
            if saved[group].keys() != members.keys():
                raise ValueError(f"{folder}: its {group} holds other tensors than this run's; it is of another model.")
            for name, tensor in members.items():
                tensor.copy_(saved[group][name])
        optimizer.load_state_dict(saved["optimizer"])


class _Group(Single):
    """Several processes of one group."""

    def __init__(self, device: torch.device | str):
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list:
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class DDP(_Group):
    """A copy of the model on each rank, gradients averaged while the backward pass runs."""

    def prepare(self, model: nn.Module) -> nn.Module:
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def backward_pass(self, prepared: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else prepared.no_sync()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return super().weights(model) if self.rank == 0 else {}

    def save(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.rank == 0:
            super().save(folder, tensors, model, optimizer)


class FSDP(_Group):
    """Parameters, gradients and optimiser shared out over the ranks (torch's `fully_shard`), for all weights of a
    Sana transformer that is too large for one device. States are written in parts that any world size can read."""

    def prepare(self, model: SanaTransformer) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        if not all(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("A model is shared out to train all its weights; a LoRA is trained without sharing out.")
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        for block in model.blocks:
            # keys and values are computed before the block is called, so they gather their weights by themselves
            fully_shard(block.cross_attn.kv_linear, mesh=mesh)
            if any(True for _ in block.cross_attn.k_norm.parameters()):
                fully_shard(block.cross_attn.k_norm, mesh=mesh)
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def backward_pass(self, prepared: nn.Module, last: bool) -> AbstractContextManager:
        prepared.set_requires_gradient_sync(last)
        return nullcontext()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def save(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        state = {**tensors, "optimizer": get_optimizer_state_dict(model, optimizer)}
        try:
            checkpoint.save(state, checkpoint_id=folder / SHARDS)
        except checkpoint.api.CheckpointException as error:
            raise OSError(errno.EIO, str(error)) from error

    def load(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not (folder / SHARDS).is_dir():
            raise ValueError(f"{folder} was saved without sharing the model out: go on with it without --shard.")
        _load_shards(folder, tensors, model, optimizer)


def _load_shards(folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state = {**tensors, "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder / SHARDS)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def from_environment(device: str | None = None, *, shard: bool = False) -> Single:
    """What torchrun's environment variables ask for: one process where there are none.

    Args:
        device: "cuda" or "cpu"; None: the GPU of this rank where there is one.
        shard: share the model out instead of copying it.

    Raises:
        ValueError: sharding in one process.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shard:
            raise ValueError("Sharding needs more than one process; start them with torchrun --nproc-per-node=N.")
        return Single(kind)
    if kind.startswith("cuda"):
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo", timeout=PATIENCE)
    return FSDP(kind) if shard else DDP(kind)
