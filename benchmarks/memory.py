"""How much GPU memory a picture takes, by model and stage: followed tensor by tensor, or measured on a GPU.

    python -m benchmarks.memory              without computing: what every tensor would take, in bfloat16
    python -m benchmarks.memory --measure    on the GPU, with random weights

Both print the table of the README. What is followed leaves out the workspaces of libraries, and the driver's own some
hundred MB. A stage is the text encoder's, the transformer's or the autoencoder's work; with
all networks resident the peak is their weights and the largest stage, one at a time it is the largest of both.
"""

import argparse
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, Gemma2Config

from sana_core.config import AUTOENCODERS, TRANSFORMERS
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from sana_core.models.tiling import decode_tiled

AUTOENCODER = AUTOENCODERS["dc-ae-f32c32-sana-1.1"]
MODELS = [
    "Sana_600M_512px", "Sana_600M_1024px", "Sana_1600M_1024px_BF16", "Sana_1600M_2Kpx_BF16", "Sana_1600M_4Kpx_BF16",
    "SANA1.5_4.8B_1024px", "Sana_Sprint_0.6B_1024px", "Sana_Sprint_1.6B_1024px",
]  # fmt: skip
DTYPE = torch.bfloat16
TILE = 16  # latent positions a side
PROMPT_TOKENS = 530  # the instruction and 300 tokens of caption


class TensorWatch(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, for as long as each lives."""

    def __init__(self, *known: nn.Module):
        super().__init__()
        self.held = self.peak = 0
        self.storages: set[int] = set()
        for module in known:
            self.leave_out(module.state_dict().values())

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not to count these, which were there before."""
        self.storages.update(_storage(tensor) for tensor in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, out)):
            if isinstance(tensor, Tensor):
                self._count(_holder(tensor))
        return out

    def _count(self, holder: torch.UntypedStorage | Tensor) -> None:
        key = holder._cdata
        if key in self.storages:
            return
        size = holder.nbytes if isinstance(holder, Tensor) else holder.nbytes()
        self.storages.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(holder, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.held -= size
        self.storages.discard(key)


def _storage(tensor: Tensor) -> int:
    return _holder(tensor)._cdata


def _holder(tensor: Tensor) -> torch.UntypedStorage | Tensor:
    """What holds a tensor's memory: its storage, or itself where it is packed in a library's own way."""
    return tensor if tensor.is_mkldnn else tensor.untyped_storage()


@dataclass(frozen=True)
class Stage:
    """Bytes of a network's weights, and of all else that its work holds at once."""

    weights: int
    work: int


@dataclass(frozen=True)
class Row:
    """One model's picture, at its own size."""

    name: str
    size: int
    text: Stage
    sampling: Stage
    decoding: Stage
    decoding_in_tiles: Stage

    def together(self, decoding: Stage) -> int:
        """The peak with all networks on the GPU."""
        stages = (self.text, self.sampling, decoding)
        return sum(stage.weights for stage in stages) + max(stage.work for stage in stages)

    def figures(self) -> tuple[int, ...]:
        """The table's columns, in bytes."""
        whole, tiles = self.decoding, self.decoding_in_tiles
        peaks = (self.together(whole), self.together(tiles), self.one_at_a_time)
        return (self.sampling.weights, self.sampling.work, whole.work, tiles.work, *peaks)

    @property
    def one_at_a_time(self) -> int:
        """The peak where each network leaves the GPU after its work, as ComfyUI has it where memory is short."""
        return max(stage.weights + stage.work for stage in (self.text, self.sampling, self.decoding_in_tiles))


Peak = Callable[[nn.Module, Callable[[], object]], int]


def followed_peak(network: nn.Module, work: Callable[[], object]) -> int:
    """Most bytes that the tensors of the work take at once."""
    with TensorWatch(network) as watch:
        work()
    return watch.peak


def measured_peak(network: nn.Module, work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator gave out at once for the work."""
    work()  # libraries take their workspaces at the first call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def weights_of(network: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def text_stage(peak: Peak) -> Stage:
    """Gemma-2-2b over a whole prompt."""
    encoder = AutoModel.from_config(Gemma2Config(), dtype=DTYPE, attn_implementation="eager")
    ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
    return Stage(weights_of(encoder), peak(encoder, partial(encoder, input_ids=ids, use_cache=False)))


def sampling_stage(name: str, peak: Peak) -> Stage:
    """One step: two rows under guidance, of which Sprint has no need."""
    config = TRANSFORMERS[name]
    transformer = SanaTransformer(config, dtype=DTYPE)
    side = config.image_size // AUTOENCODER.spatial_compression
    rows = 1 if config.guidance_embed else 2
    guidance = torch.full((rows,), 4.5) if config.guidance_embed else None
    x = torch.zeros(rows, config.in_channels, side, side, dtype=DTYPE)
    context = torch.zeros(rows, 300, config.caption_channels, dtype=DTYPE)
    arguments = (x, torch.full((rows,), 0.5), context)
    return Stage(weights_of(transformer), peak(transformer, partial(transformer, *arguments, guidance=guidance)))


def decoding_stage(size: int, peak: Peak, tiled: bool) -> Stage:
    """One picture, whole or in tiles of 512 pixels."""
    vae = DCAE(AUTOENCODER, dtype=DTYPE)
    side = size // AUTOENCODER.spatial_compression
    latent = torch.zeros(1, AUTOENCODER.latent_channels, side, side, dtype=DTYPE)
    work = partial(decode_tiled, vae, latent, TILE) if tiled else partial(vae.decode, latent)
    return Stage(weights_of(vae), peak(vae, work))


def rows(peak: Peak) -> Iterator[Row]:
    """What each model takes."""
    text = text_stage(peak)
    for name in MODELS:
        size = TRANSFORMERS[name].image_size
        yield Row(
            name,
            size,
            text,
            sampling_stage(name, peak),
            decoding_stage(size, peak, tiled=False),
            decoding_stage(size, peak, tiled=True),
        )


@contextmanager
def without_computing() -> Iterator[Peak]:
    """Networks without contents, on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        yield followed_peak


@contextmanager
def on_the_gpu() -> Iterator[Peak]:
    """Random networks on the GPU."""
    with torch.device("cuda"), torch.no_grad():
        yield measured_peak


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="on the GPU instead of on paper")
    args = parser.parse_args()
    if args.measure and not torch.cuda.is_available():
        sys.stderr.write(f"error: PyTorch {torch.__version__} finds no usable GPU to measure on\n")
        return 1
    device = f"measured on {torch.cuda.get_device_name()}" if args.measure else "followed, not measured"
    write = sys.stdout.write
    write(f"GB of bfloat16, {device}, PyTorch {torch.__version__}\n\n")
    write("| Model | Pixels | Transformer | A step | Decoding | in tiles | Resident | in tiles | One at a time |\n")
    write("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
    with on_the_gpu() if args.measure else without_computing() as peak:
        for row in rows(peak):
            write(f"| {row.name} | {row.size} | {' | '.join(map(_gigabytes, row.figures()))} |\n")
    write(f"\nBesides: text encoder {_gigabytes(row.text.weights)} and {_gigabytes(row.text.work)} for its work, ")
    write(f"autoencoder {_gigabytes(row.decoding.weights)}.\n")
    return 0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
