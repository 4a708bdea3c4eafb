"""Training in a graph: a MODEL and a data set to a LoRA, or to a model with other weights."""

import gc
import logging
import re
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

from ..sana_core.checkpoint import read_lora
from ..sana_core.training.chart import draw_run
from ..sana_core.training.config import PRECISIONS, TrainConfig
from ..sana_core.training.finetune import MODES, FineTuning, Watch, fine_tune
from ..sana_core.training.lock import run_lock
from ..sana_core.training.lora import TARGETS, comfy_lora
from ..sana_core.training.optimizers import OPTIMIZERS, optimizer_factory
from ..sana_core.training.progress import Progress, read_losses
from .adapter import load_model
from .dataset import DatasetType
from .lora import patch_model
from .sampling import seed_input
from .trainable import check_parts, encode_dataset, trainable_copy

log = logging.getLogger(__name__)

RUNS = "sana_training"  # in ComfyUI's output folder
CACHE = ".cache"  # beside the runs
AUTO = "auto"
_PREVIEW_SECONDS = 2.0
_NAME = re.compile(r"\w[\w .-]*")


class SanaTrainer(io.ComfyNode):
    """MODEL, VAE, CLIP and SANA_DATASET to LORA_MODEL, MODEL and LOSS_MAP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaTrainer",
            display_name="Sana Trainer",
            category="sana/training",
            description="Trains a LoRA, or all weights, with Sana's own objective, and shows the loss and what the "
            "model draws meanwhile. Cancel stops it and saves; queued again, it goes on from there.",
            search_aliases=["train lora", "finetune", "fine-tune", "dreambooth", "training"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    "lora", display_name="LORA_MODEL", tooltip="The LoRA, for Load LoRA Model and Save LoRA Weights."
                ),
                io.Model.Output("trained", display_name="MODEL", tooltip="The model with what it has learnt."),
                io.Custom("LOSS_MAP").Output("loss", display_name="LOSS_MAP", tooltip="For Plot Loss Graph."),
                io.String.Output(
                    "path",
                    display_name="path",
                    tooltip="Folder of the run, with the result as a file, the saved states, the log and the samples.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, run_name) -> bool | str:
        """Refuse a name that is no plain name of a folder before anything is loaded."""
        try:
            _run_folder(run_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, vae, clip, dataset, run_name, **options) -> io.NodeOutput:
        """Train. Raises ValueError and others in words for the user; InterruptProcessingException after saving."""
        folder = _run_folder(run_name)
        check_parts(model, vae, clip)
        device = comfy.model_management.get_torch_device()
        settings = _settings(options, device)
        optimizer_factory(settings.config.optimizer)
        prompts = [line.strip() for line in options.get("sample_prompts", "").splitlines() if line.strip()]
        with run_lock(folder):
            pass  # a folder in use, or that cannot be written to, is found out before hours of encoding
        display = _Display(folder, cls.hidden)
        cache, samples, pictures = encode_dataset(dataset, prompts, vae, clip, folder.parent / CACHE, display.encoding)
        network = trainable_copy(model, settings.weights_dtype(device))
        try:
            with torch.inference_mode(False):
                options = {
                    "choice": dataset.choice,
                    "pictures": pictures,
                    "watch": Watch(display.training, display.drawn),
                }
                result = fine_tune(network, _name_of(model), samples, cache, settings, folder, **options)
                lora = comfy_lora(network) if settings.mode == "lora" else None
        finally:
            del network
            gc.collect()
            comfy.model_management.soft_empty_cache()
        losses = read_losses(folder)
        summary = f"{result}\n{len(losses)} steps, loss {losses[-1]:.4f}"
        return io.NodeOutput(
            ExecutionBlocker("All weights were trained, which gives no LORA_MODEL: use the MODEL.")
            if lora is None
            else lora,
            _trained(model, result, settings.mode),
            {"loss": losses},
            str(folder),
            ui=ui.PreviewText(summary),
        )


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="Model from Load Sana Model, with or without LoRAs. It stays as it is."),
        io.Vae.Input("vae", tooltip="Autoencoder from Load Sana DC-AE."),
        io.Clip.Input("clip", tooltip="Text encoder from Load Sana Text Encoder."),
        DatasetType.Input("dataset", tooltip="From Sana Dataset."),
        io.String.Input(
            "run_name",
            default="my_lora",
            tooltip=f"Name of the run, a folder in output/{RUNS}. With a name that is there, its run goes on.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default="lora",
            tooltip="A LoRA, or full: all weights, for which the 1.6B model needs a GPU of 32 GB.",
        ),
        io.Int.Input("steps", default=500, min=1, max=10_000_000, tooltip="Updates of the weights, in all."),
        io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures in a batch."),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.000001,
            tooltip="0 takes what is usual: 0.0001 for a LoRA, 0.00002 for all weights, 1 with prodigy.",
        ),
        io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Of the LoRA: how much it can learn, and its size."),
        seed_input("Number that all randomness comes from: the same seed gives the same result."),
        io.Int.Input("save_every", default=250, min=1, max=1_000_000, tooltip="Steps between saved states."),
        io.Int.Input(
            "sample_every",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between pictures of the sample prompts, always with the same noise. 0 draws none.",
        ),
        io.String.Input(
            "sample_prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="What to draw meanwhile, a prompt a line. The pictures are kept in the run's folder.",
        ),
        *_advanced_inputs(),
    ]


def _advanced_inputs() -> list[io.Input]:
    extra = {"optional": True, "advanced": True}
    return [
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default="attention",
            tooltip="Which layers get a LoRA.",
            **extra,
        ),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default="adamw",
            tooltip="adamw8bit saves memory when all weights are trained. All but adamw and adafactor need a package, "
            "which the error names.",
            **extra,
        ),
        io.Combo.Input(
            "precision",
            options=[AUTO, *PRECISIONS],
            default=AUTO,
            tooltip="Of the computation. auto is bf16 on a GPU, fp32 on a CPU.",
            **extra,
        ),
        io.Boolean.Input(
            "recompute",
            default=True,
            tooltip="Gradient checkpointing: much less memory, a third more time, the same result.",
            **extra,
        ),
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=4096,
            tooltip="Batches to an update: as good as a larger batch, in the memory of a small one.",
            **extra,
        ),
        io.Float.Input(
            "ema_decay",
            default=0.0,
            min=0.0,
            max=0.999999,
            step=0.0001,
            tooltip="Keeps a moving average of the weights, which is then the result: 0.999 for some thousand steps. "
            "0 keeps none.",
            **extra,
        ),
        io.Float.Input(
            "validation_share",
            default=0.0,
            min=0.0,
            max=0.9,
            step=0.01,
            tooltip="Part of the pictures that is not trained on, but measured at each save: log.jsonl has the loss.",
            **extra,
        ),
    ]


def _run_folder(name: str) -> Path:
    """Where a run of that name is. Raises ValueError for anything but the plain name of a folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((".", " ")):
        raise ValueError(
            f"The run_name is {name!r}, expected the name of a folder: letters, digits, spaces, dots, - and _, with a "
            "letter or digit first."
        )
    return Path(folder_paths.get_output_directory(), RUNS, name)


def _settings(options: dict, device: torch.device) -> FineTuning:
    """What the inputs ask for. Raises ValueError."""
    mode, steps = options["mode"], options["steps"]
    precision = options.get("precision", AUTO)
    if precision == AUTO:
        precision = "bf16" if device.type == "cuda" else "fp32"
    rate = {"learning_rate": options["learning_rate"]} if options["learning_rate"] else {}
    share = options.get("validation_share", 0.0)
    make = TrainConfig.lora if mode == "lora" else TrainConfig.full
    config = make(
        steps,
        **rate,
        optimizer=options.get("optimizer", "adamw"),
        precision=precision,
        accumulation=options.get("accumulation", 1),
        ema_decay=options.get("ema_decay", 0.0),
        warmup_steps=min(100, steps // 10),
        save_every=options["save_every"],
        sample_every=options["sample_every"],
        validate_every=options["save_every"] if share else 0,
        log_every=1,
        seed=options["seed"],
    )
    return FineTuning(
        config,
        mode=mode,
        rank=options["rank"],
        targets=options.get("targets", "attention"),
        batch_size=options["batch_size"],
        recompute=options.get("recompute", True),
        validation_share=share,
    )


def _name_of(model) -> str:
    """What the LoRA's file shall say that it was trained on: the file's name, where the loader left it."""
    made_by = model.cached_patcher_init
    return Path(made_by[1][0]).stem if made_by else "sana"


def _trained(model, result: Path, mode: str):
    """The MODEL with what was learnt."""
    if mode == "lora":
        return patch_model(model, read_lora(result, model.model.diffusion_model.config), 1.0)
    return load_model(result)


class _Display:
    """The node's progress bar, the picture and the text on it; and where Cancel ends the work."""

    def __init__(self, folder: Path, hidden):
        self._losses = read_losses(folder)
        self._samples: list = []
        self._bar = comfy.utils.ProgressBar(1)
        self._shown = -_PREVIEW_SECONDS
        self._server = getattr(PromptServer, "instance", None)
        self._node = None if hidden is None else hidden.unique_id

    def encoding(self, done: int, total: int) -> None:
        """Pictures and captions encoded so far."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._write(f"encoding {done} of {total} pictures and captions")
        self._bar.update_absolute(done, total)

    def drawn(self, samples: list) -> None:
        """New samples, for the next preview."""
        self._samples = samples
        self._shown = -_PREVIEW_SECONDS

    def training(self, progress: Progress) -> None:
        """A step is done."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        del self._losses[progress.step - 1 :]  # of a run that went on from an earlier state
        self._losses.append(progress.loss)
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        self._write(
            f"step {progress.step} of {progress.steps}, loss {progress.smoothed_loss:.4f}, rate "
            f"{progress.learning_rate:.2e}, gradient {progress.grad_norm:.3f}, {progress.images_per_second:.2f} "
            f"images/s, {minutes}:{seconds:02d} left"
        )
        preview, now = None, time.monotonic()
        if now - self._shown >= _PREVIEW_SECONDS or progress.step == progress.steps:
            self._shown = now
            picture = draw_run(self._losses, self._samples)
            preview = ("JPEG", picture, max(picture.size))
        self._bar.update_absolute(progress.step, progress.steps, preview)

    def _write(self, text: str) -> None:
        if self._server is not None and self._node is not None:
            self._server.send_progress_text(text, self._node)
