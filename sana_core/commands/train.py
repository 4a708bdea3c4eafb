"""`train`: fine-tune a model on a folder of pictures and captions, on one device or with torchrun on many."""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm.contrib.logging import logging_redirect_tqdm

from ..autoencoder import decode_latents
from ..checkpoint import load_dc_ae, load_text_encoder, load_tokenizer, load_transformer
from ..resolution import ASPECT_RATIOS
from ..training.cache import Cache
from ..training.captions import OFFICIAL_CHOICE, CaptionChoice
from ..training.config import PRECISIONS, SCHEDULES, TrainConfig
from ..training.dataset import Dataset, read_dataset
from ..training.distributed import Single, from_environment
from ..training.encoders import latent_encoder, text_feature_encoder
from ..training.entries import left_out_in_short
from ..training.finetune import MODES, FineTuning, fine_tune
from ..training.lock import RunInUse, run_lock
from ..training.loop import TrainingDiverged
from ..training.lora import TARGETS
from ..training.optimizers import OPTIMIZERS, optimizer_factory
from ..training.presets import PRECISION, PRESETS, RECOMPUTE
from ..training.report import report
from ..training.samples import Samples
from ..training.stop import Stopped
from .models import NANO_FILES, add_model_options, component_paths, model_files

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PRESETS = "; ".join(f"{name}: {preset.meant_for}" for name, preset in PRESETS.items())


def add_parser(commands) -> None:
    """Declare `train` among the commands."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model on pictures with captions",
        description="Train a LoRA, or all weights, on a folder of pictures with captions. The same command goes on "
        "where it was stopped; Ctrl-C saves. torchrun starts it on several GPUs.",
    )
    add_data_options(parser)
    add_model_options(parser, dtype=False)
    add_run_options(parser)
    add = parser.add_argument
    add("--check", action="store_true", help="decode every picture and report; nothing is trained")
    add("--verbose", action="store_true", help="say what was loaded, and why so")
    parser.set_defaults(run=train)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `load_dataset` reads."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with pictures and captions, or one .tar")
    add("--resolution", type=int, choices=list(ASPECT_RATIOS), required=True, help="table of aspect buckets, in pixels")
    add(
        "--missing-captions",
        default="skip",
        metavar="skip|error|empty|filename|text:CAPTION",
        help="what becomes of pictures without a caption",
    )
    add(
        "--min-score",
        type=float,
        default=0.0,
        help="leave out pictures whose captions all have a CLIP score below it",
    )
    add(
        "--caption-threshold",
        type=float,
        default=OFFICIAL_CHOICE.threshold,
        metavar="SCORE",
        help="of several captions, those with a lower CLIP score are drawn only if all have one",
    )
    add(
        "--caption-temperature",
        type=float,
        default=OFFICIAL_CHOICE.temperature,
        metavar="T",
        help="of several captions, one is drawn with weight score^(1/T): near 0 always the best, 1 by the score",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `fine_tuning` reads, and where the run is."""
    add = parser.add_argument
    add("--output", type=Path, help="folder of the run: states, log.jsonl, samples and the result")
    add("--cache", type=Path, help="folder for latents and text features; the default is .cache beside the run")
    add("--steps", type=int, help="how many updates of the weights")
    add("--mode", choices=MODES, default="lora", help="a LoRA, or all weights")
    add("--rank", type=int, default=16, help="of the LoRA")
    add("--targets", choices=list(TARGETS), default="attention", help="which layers get a LoRA")
    add("--preset", choices=list(PRESETS), help=f"batch, optimizer and such for a GPU's memory. {_PRESETS}")
    add("--batch", type=int, help="pictures of each process in a batch; the default is 1, or the preset's")
    add("--accumulation", type=int, default=1, help="batches to an update")
    add("--learning-rate", type=float, help="the default is 1e-4 for a LoRA and 2e-5 for all weights; 1 with prodigy")
    add("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate, after the warm-up")
    add("--warmup", type=int, help="steps; the default is 100, or a tenth of --steps where that is less")
    add("--optimizer", choices=list(OPTIMIZERS), help="the default is adamw, or the preset's")
    add("--precision", choices=PRECISIONS, help="of the computation; the default is bf16, fp32 on a CPU")
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing: less memory, a third more time; the default is no, or the preset's",
    )
    add("--ema", type=float, default=0.0, help="decay of the weights' average, such as 0.999; 0 keeps none")
    add("--compile", action="store_true", help="torch.compile the blocks: a slow start, then faster steps")
    add("--shard", action="store_true", help="under torchrun, share the model out (FSDP2); for --mode full")
    add("--save-every", type=int, default=250, help="steps")
    add("--sample-every", type=int, help="steps between pictures of --sample-prompt; the default is --save-every's")
    add("--sample-prompt", action="append", default=[], help="what to draw meanwhile; repeat the option for more")
    add("--validation-share", type=float, default=0.0, help="part of the pictures to measure the loss on instead")
    add("--tensorboard", action="store_true", help="write TensorBoard's files as well")
    add("--seed", type=int, default=0, help="of all randomness")


def load_dataset(args: argparse.Namespace, *, decode: bool = False) -> Dataset:
    """The data set that the options name; `decode` looks at all of every picture."""
    return read_dataset(
        args.data,
        args.resolution,
        missing_captions=args.missing_captions,
        min_score=args.min_score,
        choice=CaptionChoice(args.caption_threshold, args.caption_temperature),
        decode=decode,
    )


def check(args: argparse.Namespace) -> None:
    """Print the report on the data set. Raises DatasetError if nothing in it is usable."""
    tokenizer = load_tokenizer(args.text_encoder or NANO_FILES["text_encoder"])
    sys.stdout.write(f"{report(load_dataset(args, decode=True), tokenizer)}\n")


def train(args: argparse.Namespace) -> None:
    """Train, and tell the path of the result. Raises ValueError, OSError, FloatingPointError, in words for the user."""
    if args.check:
        check(args)
        return
    missing = [f"--{name}" for name in ("output", "steps") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: say where the run shall be, and how long")
    if args.sample_every and not args.sample_prompt:
        raise ValueError("--sample-every given without a --sample-prompt: say what to draw")
    files = model_files(args)
    settings = fine_tuning(args)  # what cannot be is found out before anything is read, encoded or loaded
    optimizer_factory(settings.config.optimizer)
    dataset = load_dataset(args)
    ranks = from_environment(args.device and str(args.device), shard=args.shard)
    if ranks.rank == 0 and (left_out := left_out_in_short(dataset.problems)):
        logger.warning("left out of %s: %s --check lists all.", dataset.folder, left_out)
    try:
        with logging_redirect_tqdm():  # so that messages do not stand in the middle of a progress bar
            result = _run(args, files, settings, dataset, ranks)
    except (RunInUse, TrainingDiverged) as error:
        raise ValueError(str(error)) from error
    except Stopped as stopped:
        if ranks.rank == 0:
            logger.warning("Step %d is saved in %s: the same command goes on from there.", stopped.step, args.output)
        raise
    if ranks.rank == 0:
        sys.stdout.write(f"{result}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def fine_tuning(args: argparse.Namespace) -> FineTuning:
    """What the options ask for, the preset's settings where they leave it open. Raises ValueError."""
    preset = PRESETS.get(args.preset)
    on_cpu = args.device.type == "cpu" if args.device else not torch.cuda.is_available()
    if args.shard and args.mode != "full":
        raise ValueError("--shard shares out all weights: it goes with --mode full. A LoRA needs no sharing out.")
    given = {
        "learning_rate": args.learning_rate,
        "optimizer": args.optimizer or (preset and preset.optimizer(args.mode)),
        "precision": args.precision or (preset and PRECISION) or ("fp32" if on_cpu else "bf16"),
        "warmup_steps": min(100, args.steps // 10) if args.warmup is None else args.warmup,
    }
    config = getattr(TrainConfig, args.mode)(
        args.steps,
        **{name: value for name, value in given.items() if value is not None},
        schedule=args.schedule,
        accumulation=args.accumulation,
        ema_decay=args.ema,
        compile=args.compile,
        save_every=args.save_every,
        log_every=1,
        sample_every=_sample_every(args),
        validate_every=args.save_every if args.validation_share else 0,
        tensorboard=args.tensorboard,
        seed=args.seed,
    )
    recompute = args.recompute
    if recompute is None:
        recompute = preset is not None and RECOMPUTE
    return FineTuning(
        config,
        mode=args.mode,
        rank=args.rank,
        targets=args.targets,
        batch_size=args.batch if args.batch is not None else (preset.batch_size if preset else 1),
        recompute=recompute,
        validation_share=args.validation_share,
    )


def _sample_every(args: argparse.Namespace) -> int:
    if args.sample_every is not None:
        return args.sample_every
    return args.save_every if args.sample_prompt else 0


def _run(args: argparse.Namespace, files: dict[str, Path], settings: FineTuning, dataset: Dataset, ranks: Single):
    paths = _first_rank_first(ranks, lambda: component_paths(files))
    if ranks.rank == 0:
        with run_lock(args.output):
            pass  # a folder in use, or that cannot be written to, is found out before hours of encoding
    # The encoders are loaded first and the text encoder is gone again when the transformer takes the memory.
    cache, samples, pictures = _encode(args, paths, dataset, ranks)
    dtype = settings.weights_dtype(ranks.device)
    model = load_transformer(paths["transformer"], variant=args.variant, device=ranks.device, dtype=dtype)
    base_model = (args.model or paths["transformer"]).name
    return fine_tune(
        model, base_model, samples, cache, settings, args.output, choice=dataset.choice, ranks=ranks, pictures=pictures
    )


def _encode(args: argparse.Namespace, paths: dict[str, Path], dataset: Dataset, ranks: Single):
    """The filled cache, what is in it, and the sample prompts with what decodes them."""
    dtype = torch.float32 if ranks.device.type == "cpu" else None
    vae = load_dc_ae(paths["vae"], device=ranks.device, dtype=dtype)
    encoder = load_text_encoder(paths["text_encoder"], device=ranks.device, dtype=dtype)
    encoders = latent_encoder(vae), text_feature_encoder(encoder)

    cache = Cache(args.cache or args.output.parent / ".cache", *encoders)
    try:
        samples, _ = cache.fill(dataset, ranks=ranks)
    except KeyboardInterrupt:
        logger.warning("What is encoded by now is kept: the same command goes on from there.")
        raise
    pictures = Samples(args.sample_prompt, encoder, vae, args.resolution, partial(decode_latents, vae))
    return cache, samples, pictures


def _first_rank_first(ranks: Single, work: Callable[[], Result]) -> Result:
    """What the work gives on each rank; the first one has done it for all before the others start."""
    if ranks.rank > 0:
        ranks.gather(None)
    result = work()
    if ranks.rank == 0:
        ranks.gather(None)
    return result
