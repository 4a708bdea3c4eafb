"""A micro transformer, batches for it, and runs that train it: also as a program, for torchrun.

python tests/training/micro.py JOBS     a JSON file with a list of lists of arguments of `job`
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from sana_core.training.batch import Batch
from sana_core.training.config import TrainConfig
from sana_core.training.distributed import Single, from_environment
from sana_core.training.loop import Hooks, train
from sana_core.training.loss import FlowMatching
from sana_core.training.optimizers import OPTIMIZERS
from tests import tiny

CHANNELS = tiny.CHANNELS
NULL = torch.linspace(-1, 1, CHANNELS)[None]
GLOBAL_BATCH = 4
NO_HOOKS = Hooks()

# For equality within rounding: where a gradient is zero but for rounding, as a key's bias has it, Adam divides noise
# by noise and takes a whole step in its direction.
OPTIMIZERS["sgd"] = lambda: lambda parameters, rate, decay: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def sample(number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Latent [32, 3, 3], features [6, C] and how many of these are the caption, all from the number."""
    generator = torch.Generator().manual_seed(number)
    latent = torch.randn(32, 3, 3, generator=generator)
    return latent, torch.randn(6, CHANNELS, generator=generator), 2 + number % 4


class Samples:
    """A source of endless samples, dealt out to the ranks one by one."""

    def __init__(self, size: int, ranks: Single | None = None):
        self.size, self.rank, self.world_size = size, *((ranks.rank, ranks.world_size) if ranks else (0, 1))

    def batch(self, step: int) -> Batch:
        first = step * self.size * self.world_size
        numbers = range(first + self.rank, first + self.size * self.world_size, self.world_size)
        latents, embeds, lengths = zip(*map(sample, numbers), strict=True)
        longest = max(lengths)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return Batch(
            torch.stack(latents),
            torch.stack(embeds)[:, :longest],
            mask,
            tuple(f"picture {number}.png" for number in numbers),
        )

    def samples_before(self, step: int) -> int:
        return step * self.size * self.world_size

    def step_after(self, samples: int) -> int:
        return -(-samples // (self.size * self.world_size))


def config(steps: int = 6, **changes) -> TrainConfig:
    settings = {
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "precision": "fp32",
        "ema_decay": 0.9,
        "save_every": 2,
        "log_every": 1,
    }
    return TrainConfig(steps, **{**settings, **changes})


def objective(**changes) -> FlowMatching:
    return FlowMatching(3.0, NULL, **changes)


def run(
    folder: Path,
    model=None,
    *,
    ranks: Single | None = None,
    size: int = GLOBAL_BATCH,
    hooks: Hooks = NO_HOOKS,
    **changes,
):
    """Trains the micro model (or the given one); returns it with its averaged weights."""
    model = model or tiny.transformer()
    source = Samples(size, ranks)
    return train(model, source, objective(), config(**changes), folder, ranks=ranks, hooks=hooks)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def job(folder: str | Path, steps: int, optimizer: str, shard: bool = False) -> None:
    """Trains with the processes that there are, and writes the weights and their names to FOLDER/trained.pt."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, ranks = Path(folder), from_environment("cpu", shard=shard)
    trained = run(folder, ranks=ranks, size=GLOBAL_BATCH // ranks.world_size, steps=steps, optimizer=optimizer)
    whole = ranks.weights(trained)
    if ranks.rank == 0:
        torch.save(whole, folder / "trained.pt")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        job(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else the interpreter ends beside its threads, and may abort
