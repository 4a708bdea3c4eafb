"""How much GPU memory training takes, for the goals and for each preset: followed tensor by tensor, or measured.

What is followed computes as a GPU does under autocast, where layer norms are float32, with PyTorch's kernels; those of
Triton keep less. Optimisers change their state in place, so that it is counted from its format.
"""

import contextlib
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.contest import CANNOT
from benchmarks.memory import TensorWatch, weights_of
from benchmarks.steps import Data, Job, Repeated, Unsaved
from sana_core.config import TRANSFORMERS
from sana_core.kernels import REFERENCE, best_kernels, reference
from sana_core.models.sana import SanaTransformer
from sana_core.training.config import TrainConfig
from sana_core.training.loop import train
from sana_core.training.lora import add_adapters
from sana_core.training.loss import FlowMatching, flow_matching_errors
from sana_core.training.presets import PRECISION, PRESETS, RECOMPUTE

RANK, TARGETS = 16, "attention"  # what `train` takes where nothing else is said
STATE = {"adamw": 8, "adamw8bit": 2 + 2 * 4 / 256}  # bytes to a weight; the latter's scales are of 256 weights each
AUTOENCODER = 624_000_000  # bytes of the DC-AE in bfloat16, which stays for sample pictures
RESERVE = 1_500_000_000  # bytes: the driver's own, workspaces of libraries, and gaps between tensors
GIB = 2**30
EMA = 0.999
CAPTION = 300  # tokens: the longest

_06, _16, _48 = "Sana_600M_512px", "Sana_1600M_1024px_BF16", "SANA1.5_4.8B_1024px"


@dataclass(frozen=True)
class Plan:
    """One way to train, and the card that it is to fit."""

    title: str
    preset: str  # "12gb" and so on; of a goal too
    model: str
    pixels: int
    mode: str
    ema: bool = False

    @property
    def gigabytes(self) -> int:
        """Of the card."""
        return int(self.preset.removesuffix("gb"))

    @property
    def name(self) -> str:
        """As the table has it."""
        mode = "LoRA" if self.mode == "lora" else "all weights"
        batch, optimizer = PRESETS[self.preset].batch_size, PRESETS[self.preset].optimizer(self.mode)
        return f"{mode}, {self.title}, {self.pixels} px, batch {batch}, {optimizer}{', EMA' if self.ema else ''}"

    @property
    def job(self) -> Job:
        """What is computed."""
        batch = PRESETS[self.preset].batch_size
        config = TRANSFORMERS[self.model]
        return Job(self.title, config, self.pixels, self.mode, batch, precision=PRECISION, recompute=RECOMPUTE)


PLANS = (
    Plan("0.6B", "12gb", _06, 512, "lora"),  # a goal
    Plan("0.6B", "12gb", _06, 1024, "lora"),
    Plan("1.6B", "12gb", _16, 1024, "lora"),
    Plan("0.6B", "12gb", _06, 512, "full"),
    Plan("1.6B", "16gb", _16, 1024, "lora"),
    Plan("0.6B", "16gb", _06, 1024, "full"),
    Plan("4.8B", "24gb", _48, 1024, "lora"),
    Plan("1.6B", "24gb", _16, 1024, "full"),
    Plan("1.6B", "32gb", _16, 1024, "full"),  # a goal
    Plan("1.6B", "32gb", _16, 1024, "full", ema=True),
)


@dataclass(frozen=True)
class Taken:
    """Bytes at the peak of a step."""

    weights: int
    optimizer: int
    average: int
    work: int  # gradients and activations

    @property
    def peak(self) -> int:
        """All of it, and the autoencoder beside it."""
        return self.weights + self.optimizer + self.average + self.work + AUTOENCODER


def as_on_a_gpu(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The adaptive norm in float32, as autocast has it on a GPU."""
    return reference.modulate(x.float(), shift, scale)


def model_of(plan: Plan, kernels, device: torch.device | str | None = None) -> SanaTransformer:
    """The transformer in the dtypes that `train` loads it in, with adapters for a LoRA."""
    half = torch.bfloat16 if plan.mode == "lora" else torch.float32
    model = SanaTransformer(TRANSFORMERS[plan.model], kernels=kernels, dtype=half, device=device)
    if plan.mode == "lora":
        add_adapters(model, RANK, targets=TARGETS)
    return model.train()


def follow(plan: Plan) -> Taken:
    """What the tensors of a step take, without computing."""
    with FakeTensorMode():
        model = model_of(plan, replace(REFERENCE, modulate=as_on_a_gpu))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        with TensorWatch(model) as watch:
            _step(plan, model, trained)
    kept = 4 * count if plan.ema else 0
    state = STATE[PRESETS[plan.preset].optimizer(plan.mode)]
    return Taken(weights_of(model), round(state * count), kept, watch.peak)


def _step(plan: Plan, model: SanaTransformer, trained: list[nn.Parameter]) -> None:
    job, side = plan.job, plan.pixels // 32
    latents = torch.zeros(job.batch, job.config.in_channels, side, side)
    embeds = torch.zeros(job.batch, CAPTION, job.config.caption_channels)
    with torch.autocast("cpu", torch.bfloat16):
        errors = flow_matching_errors(
            lambda x, timestep: model(x, timestep, embeds, recompute=job.recompute),
            latents,
            torch.zeros_like(latents),
            torch.zeros(job.batch),
        )
    errors.mean().backward()
    nn.utils.clip_grad_norm_(trained, 1.0)


def measure(plan: Plan) -> Taken:
    """What PyTorch's allocator gave out at once in three steps of the loop on the GPU; the weights are noise."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    model = model_of(plan, best_kernels(device), device)
    weights = torch.cuda.memory_allocated() - start
    data = Data.random(plan.job, device, plan.job.batch)
    config = getattr(TrainConfig, plan.mode)(
        3,
        optimizer=PRESETS[plan.preset].optimizer(plan.mode),
        precision=PRECISION,
        ema_decay=EMA if plan.ema else 0.0,
    )
    objective = FlowMatching(plan.job.config.shift, data.null, recompute=RECOMPUTE)
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        train(model, Repeated(data.batch), objective, config, Path(folder), ranks=Unsaved(device))
    peak = torch.cuda.max_memory_allocated() - start
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state, kept = round(STATE[config.optimizer] * count), 4 * count if plan.ema else 0
    return Taken(weights, state, kept, peak - weights - state - kept)


def row(plan: Plan, measured: bool) -> dict:
    """What JSON has of a plan."""
    how = f"measured on {torch.cuda.get_device_name()}" if measured else "followed, not measured on a GPU"
    known = {"name": plan.name, "preset": plan.preset, "promised": not plan.ema, "how": how, "failure": None}
    try:
        taken = measure(plan) if measured else follow(plan)
    except CANNOT as error:
        return known | {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    parts = {name: getattr(taken, name) for name in ("weights", "optimizer", "average", "work", "peak")}
    return known | parts | {"fits": taken.peak + RESERVE <= plan.gigabytes * GIB}
