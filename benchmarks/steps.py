"""One training job on both sides: the same weights, latents, captions and draws, and what shows that both agree.

Our side is the trainer's own loop, which is not taken apart: it reports after each step, and the benchmark does the
recipe's step there.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.networks import Pair, Place, pair_transformer, randomize
from benchmarks.peers import POSITIONS, caption_mask, normal
from benchmarks.recipe import LEARNING_RATE, MAX_GRAD_NORM, RANK, Features, Recipe, add_lora
from sana_core.checkpoint.keys import TRANSFORMER_RULES, diffusers_names, official_to_diffusers, transformer_rules
from sana_core.config import SanaConfig
from sana_core.kernels import best_kernels
from sana_core.models.sana import SanaTransformer
from sana_core.training.batch import Batch
from sana_core.training.config import TrainConfig
from sana_core.training.distributed import Single
from sana_core.training.loop import Hooks, train
from sana_core.training.lora import TARGETS, AdaptedLayer, add_adapters
from sana_core.training.loss import NUM_TIMESTEPS, FlowMatching, draw_normal, draw_uniform, sample_generators
from sana_core.training.progress import Progress

CAPTIONS = (24, 47, 70, 96)  # tokens, in turn
OUR_LAYERS = ("attn.qkv", "cross_attn.q_linear", "cross_attn.kv_linear")  # to_q, to_k and to_v of both attentions
SEED = 0
LIMIT = 1e-4  # of the gradients' difference in float32
SMALL = 0.1  # of the whole gradient's norm: smaller tensors are compared with that, as a key's bias has none at all
PARITY_BATCH = 2


@dataclass(frozen=True)
class Job:
    """What is trained. mode: "lora" or "full"; recompute: with gradient checkpointing, on both sides."""

    text: str  # which model, for the table
    config: SanaConfig
    pixels: int
    mode: str
    batch: int
    precision: str = "fp32"
    recompute: bool = False
    rounds: int = 8

    @property
    def name(self) -> str:
        """As the table has it."""
        mode = "LoRA" if self.mode == "lora" else "all weights"
        recomputed = ", checkpointing" if self.recompute else ""
        return f"{mode}, {self.text}, {self.pixels} px, batch {self.batch}{recomputed}"


class Unsaved(Single):
    """One process that puts no weights into the states that it saves."""

    def save(self, folder: Path, tensors: dict[str, dict], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        pass


@dataclass(frozen=True)
class Repeated:
    """A source that gives the same batch each time, as the recipe's features are the same."""

    same: Batch

    def batch(self, step: int) -> Batch:
        """The batch, for any step."""
        return self.same

    def samples_before(self, step: int) -> int:
        """One batch to a step."""
        return step * len(self.same.names)

    def step_after(self, samples: int) -> int:
        """The step that begins after so many samples."""
        return -(-samples // len(self.same.names))


@dataclass(frozen=True)
class Data:
    """The same pictures and captions as each side caches them."""

    batch: Batch  # ours: on the CPU, captions as long as the longest
    features: Features  # the recipe's: on its device, captions of 300 tokens
    null: Tensor  # of the empty prompt, which ours alone draws

    @classmethod
    def random(cls, job: Job, device: torch.device, count: int) -> "Data":
        """Noise for latents and features, zeros behind the captions' ends."""
        cpu, side = Place(torch.device("cpu"), torch.float32), job.pixels // 32
        lengths = [CAPTIONS[index % len(CAPTIONS)] for index in range(count)]
        latents = normal(cpu, count, job.config.in_channels, side, side, seed=1)
        mask = caption_mask(cpu, lengths)
        embeds = normal(cpu, count, POSITIONS, job.config.caption_channels, seed=2) * mask[:, :, None]
        names = tuple(f"picture {index}" for index in range(count))
        trimmed = slice(None), slice(max(lengths))
        batch = Batch(latents, embeds[trimmed].contiguous(), mask[trimmed].bool(), names)
        features = Features(latents.to(device), embeds.to(device), mask.to(device))
        return cls(batch, features, normal(cpu, 1, job.config.caption_channels, seed=3))


def build(job: Job, device: torch.device) -> Pair:
    """Our transformer and diffusers' in float32, with the same weights, and the same adapters for a LoRA.

    Nothing is shared between the two that one of them trains.
    """
    ours = randomize(SanaTransformer(job.config, kernels=best_kernels(device), device=device))
    pair = pair_transformer(ours)
    if job.mode == "full":
        for parameter in pair.theirs.parameters():
            parameter.data = parameter.data.clone()
        ours.requires_grad_(True)
        pair.theirs.requires_grad_(True)
        return pair
    with mock.patch.dict(TARGETS, {"recipe": OUR_LAYERS}):
        add_adapters(ours, RANK, targets="recipe", seed=SEED)
    add_lora(pair.theirs)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in trained(ours).items():
            if ".up." in name:  # at zero, as training starts, the others would have no gradient
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        theirs = trained(pair.theirs)
        for name, tensor in as_diffusers(ours, trained(ours)).items():
            theirs[name].copy_(tensor)
    return pair


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def as_diffusers(model: SanaTransformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our trained weights, or their gradients, under diffusers' and peft's names."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLayer)}
    if not layers:
        return official_to_diffusers(tensors, transformer_rules(tensors))
    renamed = {}
    for name, layer in layers.items():
        for index, key in enumerate(diffusers_names(f"{name}.weight", TRANSFORMER_RULES)[: len(layer.down)]):
            stem = key.removesuffix(".weight")
            renamed[f"{stem}.lora_A.default.weight"] = tensors[f"{name}.down.{index}"]
            renamed[f"{stem}.lora_B.default.weight"] = tensors[f"{name}.up.{index}"]
    return renamed


def narrow(job: Job, pair: Pair) -> None:
    """Weights beside a LoRA in bfloat16 where that is computed in, as both trainers have them; trained ones float32."""
    if job.mode == "lora" and job.precision == "bf16":
        for network in (pair.ours, pair.theirs):
            for parameter in network.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def run_ours(
    job: Job,
    model: SanaTransformer,
    data: Data,
    steps: int,
    on_step: Callable[[Progress], None],
    *,
    precision: str,
    caption_dropout: float | None = None,
) -> None:
    """The trainer's loop for so many steps; `on_step` is called after each."""
    options = {} if caption_dropout is None else {"caption_dropout": caption_dropout}
    objective = FlowMatching(job.config.shift, data.null, recompute=job.recompute, **options)
    config = TrainConfig(
        steps,
        LEARNING_RATE,
        precision=precision,
        max_grad_norm=MAX_GRAD_NORM,
        save_every=steps,
        seed=SEED,
    )
    ranks = Unsaved(next(model.parameters()).device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        train(model, Repeated(data.batch), objective, config, Path(folder), ranks=ranks, hooks=Hooks(on_step))


@contextlib.contextmanager
def seen_by_optimizer(look: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """While entered, `look` is called with each optimiser that is about to make a step."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: look(optimizer))
    try:
        yield
    finally:
        handle.remove()


def our_gradients(job: Job, model: SanaTransformer, data: Data) -> tuple[float, dict[str, Tensor]]:
    """Loss of the loop's first step, and the gradients that its optimiser is given, clipped, by diffusers' names."""
    losses, found = [], {}

    def look(optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in trained(model).items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    with seen_by_optimizer(look):
        run_ours(
            job, model, data, 1, lambda progress: losses.append(progress.loss), precision="fp32", caption_dropout=0
        )
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(before[name])
    return losses[0], as_diffusers(model, found)


def their_gradients(job: Job, recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Loss of the recipe's step on the draws of our first step, and its clipped gradients."""
    loss = recipe.loss(*our_draws(job.config, recipe.features.latents))
    loss.backward()
    recipe.clip()
    found = trained(recipe.transformer)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in found.items()
    }
    recipe.optimizer.zero_grad()
    return loss.item(), gradients


def our_draws(config: SanaConfig, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, noise levels and timesteps of our loop's first step, the levels from diffusers' schedule.

    Diffusers counts its shifted levels down from 1; ours are drawn on the same grid, 0 instead of 1 in it, and the
    model is told whole timesteps, as official training does, where the recipe tells it fractions.
    """
    generators = sample_generators(SEED, 0, range(len(latents)))
    index = (draw_normal((), generators).sigmoid() * NUM_TIMESTEPS).long()
    draw_uniform(generators)  # whether captions are dropped
    noise = draw_normal(latents.shape[1:], generators).to(latents)
    rising = FlowMatchEulerDiscreteScheduler(shift=config.shift).sigmas.flip(0)
    sigmas = torch.cat([rising.new_zeros(1), rising])[index].to(latents)
    return noise, sigmas, (sigmas * NUM_TIMESTEPS).floor()


def disagreement(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> tuple[float, str]:
    """How far losses and gradients are apart, and what is furthest.

    Of the loss: the difference as a share of theirs. Of each gradient: the norm of the difference as a share of
    theirs, or of `SMALL` of the whole gradient's norm where its own is less. NaN where anything is not a number.

    Raises ValueError where the two do not train the same weights.
    """
    (our_loss, our_gradients), (their_loss, their_gradients) = ours, theirs
    if our_gradients.keys() != their_gradients.keys():
        odd = sorted(our_gradients.keys() ^ their_gradients.keys())
        raise ValueError(f"{len(odd)} weights are trained by one side alone, {odd[0]} among them")
    whole = torch.stack([gradient.norm() for gradient in their_gradients.values()]).norm()
    names = ["loss", *their_gradients]
    shares = [abs(our_loss - their_loss) / abs(their_loss)]
    for name, expected in their_gradients.items():
        own = torch.maximum(expected.norm(), SMALL * whole)
        shares.append(((our_gradients[name].view_as(expected) - expected).norm() / own).item())
    worst = torch.tensor(shares, dtype=torch.float64)
    index = int(worst.nan_to_num(nan=torch.inf).argmax())
    return worst[index].item(), names[index]


def parity(job: Job, pair: Pair, device: torch.device) -> dict:
    """Both sides' loss and gradients in float32 on the same draws, as JSON has it."""
    data = Data.random(job, device, min(job.batch, PARITY_BATCH))
    ours = our_gradients(job, pair.ours, data)
    theirs = their_gradients(job, Recipe(pair.theirs, data.features, "fp32", job.recompute))
    value, worst = disagreement(ours, theirs)
    return {
        "value": value,
        "limit": LIMIT,
        "furthest": worst,
        "passed": bool(value <= LIMIT),
        "losses": [ours[0], theirs[0]],
    }
