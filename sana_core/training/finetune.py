"""Fine-tuning a model on a data set, all weights or a LoRA: what the command line and ComfyUI's node both start."""

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..checkpoint import CONFIG_KEY, CheckpointError, dump_config
from ..checkpoint.files import atomic_path, write_safetensors
from ..models.sana import SanaTransformer
from .batches import Batches
from .cache import Cache, CachedSample
from .captions import OFFICIAL_CHOICE, CaptionChoice
from .config import TrainConfig
from .distributed import FSDP, Single
from .encoders import module_identity
from .loop import Hooks, train
from .lora import TARGETS, add_adapters, save_lora
from .loss import FlowMatching
from .progress import Progress
from .samples import Samples
from .state import saved_states
from .validation import validation_loss

logger = logging.getLogger(__name__)

RESULTS = {"lora": "lora.safetensors", "full": "transformer.safetensors"}  # by mode; in a run and in each saved state
MODES = tuple(RESULTS)


@dataclass(frozen=True)
class FineTuning:
    """What is trained, and how; `config` has what all kinds of training share."""

    config: TrainConfig
    mode: str = "lora"
    rank: int = 16  # of the LoRA
    targets: str = "attention"  # of the LoRA; a name of lora.TARGETS
    batch_size: int = 1  # of each process
    recompute: bool = False  # gradient checkpointing
    validation_share: float = 0.0  # of the pictures, which are not trained on

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"The mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        if self.targets not in TARGETS:
            raise ValueError(f"The LoRA targets are {self.targets!r}, expected one of {', '.join(TARGETS)}.")
        if self.rank < 1 or self.batch_size < 1:
            raise ValueError(f"The rank is {self.rank} and the batch {self.batch_size}: expected 1 or more of each.")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"The validation share is {self.validation_share}, expected 0 (none) to below 1.")

    def weights_dtype(self, device: torch.device | str) -> torch.dtype:
        """In which the model is to be loaded: what is trained needs float32, what a LoRA stands beside does not."""
        on_gpu = torch.device(device).type == "cuda"
        half = self.mode == "lora" and self.config.precision == "bf16" and on_gpu
        return torch.bfloat16 if half else torch.float32


@dataclass(frozen=True)
class Watch:
    """Who looks on. What `on_step` raises ends the run, after its state was saved."""

    on_step: Callable[[Progress], None] | None = None
    on_samples: Callable[[list[Image.Image]], None] | None = None


def fine_tune(
    model: SanaTransformer,
    base_model: str,
    samples: Sequence[CachedSample],
    cache: Cache,
    settings: FineTuning,
    folder: Path,
    *,
    choice: CaptionChoice = OFFICIAL_CHOICE,
    ranks: Single | None = None,
    pictures: Samples | None = None,
    watch: Watch = Watch(),
) -> Path:
    """Trains the model, in place; the same call on the same folder goes on where it was stopped.

    Args:
        model: in `settings.weights_dtype`, on the ranks' device.
        base_model: its name, for the file of a LoRA.
        samples, cache: what `cache.fill` returned, and where it is.
        folder: of the run.
        choice: how one of a picture's captions is drawn.
        pictures: drawn every `config.sample_every` steps and at the end.

    Returns:
        The result's path in `folder`: of a LoRA in diffusers' form, or of a transformer in the official one.

    Raises:
        ValueError: the model cannot be trained so, or the folder holds a run with other settings.
        What `loop.train` raises. Whatever it is, the folder then has the result of the newest saved step.
    """
    ranks = ranks or Single(next(model.parameters()).device)
    check_model(model, cache)
    trained, held_out = hold_out(samples, settings.validation_share)
    config = settings.config
    share = {"rank": ranks.rank, "world_size": ranks.world_size}
    batches = Batches(trained, cache, settings.batch_size, seed=config.seed, choice=choice, **share)
    identity = {
        "base model": module_identity(model, model.config),
        "data set": batches.fingerprint,
        "mode": settings.mode,
        "batch": settings.batch_size,
        "validation": len(held_out),
    }
    if choice != OFFICIAL_CHOICE:
        identity["captions"] = f"threshold {choice.threshold:g}, temperature {choice.temperature:g}"
    if settings.mode == "lora":
        identity |= {"rank": settings.rank, "targets": settings.targets}
        add_adapters(model, settings.rank, targets=settings.targets, seed=config.seed)
    else:
        model.requires_grad_(True)
    validation = Batches(held_out, cache, settings.batch_size, seed=config.seed, choice=choice) if held_out else None
    hooks = _hooks(base_model, validation, settings, folder, ranks, pictures, watch)
    objective = FlowMatching(model.config.shift, batches.null_features, recompute=settings.recompute)
    try:
        train(model, batches, objective, config, folder, ranks=ranks, hooks=hooks, identity=identity)
    finally:
        if ranks.rank == 0 and (states := saved_states(folder)):
            publish(states[-1], settings.mode)
    return folder / RESULTS[settings.mode]


def check_model(model: SanaTransformer, cache: Cache) -> None:
    """Raises ValueError for a model that this trainer, or these features, cannot train."""
    if model.config.guidance_embed:
        raise ValueError(
            "This is a Sana-Sprint model, which is made by distillation: this trainer would undo it. Train the Sana "
            "model of its size instead."
        )
    width = cache.null_features.shape[-1]
    if width != model.config.caption_channels:
        raise ValueError(
            f"The text encoder gives features of width {width}, this model reads {model.config.caption_channels}: use "
            "the text encoder that belongs to the model."
        )


def hold_out(
    samples: Sequence[CachedSample], share: float
) -> tuple[tuple[CachedSample, ...], tuple[CachedSample, ...]]:
    """The samples to train on and those to validate with, chosen by their content: repetitions stay together.

    Raises ValueError where nothing is left to train on.
    """
    contents = sorted({sample.latent for sample in samples}, key=lambda key: hashlib.sha256(key.encode()).digest())
    count = max(1, round(share * len(contents))) if share else 0
    if count >= len(contents):
        raise ValueError(f"{len(contents)} picture(s) are too few to hold back some for validation: set its share to 0")
    chosen = set(contents[:count])
    return (
        tuple(sample for sample in samples if sample.latent not in chosen),
        tuple(sample for sample in samples if sample.latent in chosen),
    )


def publish(state: Path, mode: str) -> None:
    """Gives a saved step's result its place in the run's folder: as the same file where the disk can, else a copy."""
    source, target = state / RESULTS[mode], state.parent / RESULTS[mode]
    if not source.is_file():
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _hooks(base_model, validation: Batches | None, settings: FineTuning, folder: Path, ranks, pictures, watch) -> Hooks:
    config = settings.config

    def validate(averaged: nn.Module) -> dict[str, float]:
        return validation_loss(averaged, [validation.batch(step) for step in range(len(validation))])

    def sample(averaged: nn.Module, step: int) -> None:
        shared_out = isinstance(ranks, FSDP)  # then all ranks must compute
        if ranks.rank and not shared_out:
            return
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            drawn = pictures.draw(averaged)
        if ranks.rank == 0:
            pictures.write(drawn, folder, step)
            if watch.on_samples is not None:
                watch.on_samples(drawn)

    def export(averaged: nn.Module, step: int, state: Path) -> None:
        path = state / RESULTS[settings.mode]
        try:
            if settings.mode == "full":
                _write_transformer(averaged, path, ranks)
            elif ranks.rank == 0:
                save_lora(averaged, path, base_model=base_model, step=step)
        except CheckpointError as error:  # what the loop takes for a full disk, and tries again later
            raise OSError(errno.EIO, str(error)) from error

    def on_save(averaged: nn.Module, step: int) -> dict[str, float]:
        if ranks.rank == 0:
            try:
                publish(saved_states(folder)[-1], settings.mode)
            except CheckpointError as error:
                logger.warning("%s", error)
        return {}

    return Hooks(
        on_step=watch.on_step,
        on_save=on_save,
        validate=validate if validation else None,
        sample=sample if pictures is not None and pictures.prompts else None,
        export=export,
    )


def _write_transformer(model: nn.Module, path: Path, ranks: Single) -> None:
    """In the dtype of the published weights, with the configuration in the file."""
    dtype = getattr(torch, model.config.dtype)
    weights = {name: tensor.to(dtype) for name, tensor in ranks.weights(model).items()}
    if weights:
        write_safetensors(weights, path, {CONFIG_KEY: dump_config(model.config)})
