"""Published models, fetched into ComfyUI's model folders when a user queues the node that asks for it."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..sana_core.hub import download
from ..sana_core.published import PUBLISHED, PublishedFile, with_parts
from .notice import notice

_OUTPUTS = {  # in this order; by ComfyUI's folder
    "diffusion_models": ("model_name", "Load Sana Model"),
    "text_encoders": ("text_encoder_name", "Load Sana Text Encoder"),
    "vae": ("vae_name", "Load Sana DC-AE"),
    "controlnet": ("control_net_name", "Load Sana ControlNet"),
}


class SanaDownloadModel(io.ComfyNode):
    """Name of a published model to files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDownloadModel",
            display_name="Download Sana Model",
            category="sana/loaders",
            description="Fetches a published model from huggingface.co into ComfyUI's model folders, and nothing that "
            "is there already. Cancel stops it; queued again, it goes on from there.",
            search_aliases=["huggingface", "fetch model", "get weights", "install model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(PUBLISHED),
                    default="Sana_1600M_1024px_BF16",
                    tooltip="What to fetch. Its licence is shown with the result and stands in its repository.",
                ),
                io.Boolean.Input(
                    "with_parts",
                    default=True,
                    tooltip="Also fetch the text encoder (5.2 GB) and the autoencoder (1.2 GB) that a model needs.",
                ),
            ],
            outputs=[
                io.Combo.Output(name, display_name=name, tooltip=f"File for {loader}.")
                for name, loader in _OUTPUTS.values()
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, with_parts=True) -> io.NodeOutput:
        """Names of the files for the loaders. Raises DownloadError, in words for the user."""
        files = _chosen(model, with_parts)
        paths = [path for path, _ in download(files, _folder, watch=_progress(files))]
        names = {file.folder: file.filename for file in files}
        outputs = [names.get(folder) or ExecutionBlocker(_missing(folder, model)) for folder in _OUTPUTS]
        return io.NodeOutput(*outputs, ui=notice(_report(files, paths), cls.hidden))


def _chosen(model: str, parts: bool) -> list[PublishedFile]:
    file = PUBLISHED[model]
    return with_parts(file) if parts else [file]


def _folder(file: PublishedFile) -> Path:
    """Where the file is, else the first folder of its kind, before which ComfyUI lists one of an older name."""
    present = folder_paths.get_full_path(file.folder, file.filename)
    if present:
        return Path(present).parent
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(file.folder)]
    return next((folder for folder in folders if folder.name == file.folder), folders[0])


def _progress(files: list[PublishedFile]):
    """Watches a download: moves the node's bar over all files, and lets Cancel end it."""
    total = sum(file.size for file in files)
    before = {file: sum(other.size for other in files[:index]) for index, file in enumerate(files)}
    bar = comfy.utils.ProgressBar(total)

    def watch(file: PublishedFile, done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(before[file] + min(done, file.size), total)

    return watch


def _missing(folder: str, model: str) -> str:
    name, loader = _OUTPUTS[folder]
    return f"Download Sana Model has no {name} for {loader}: {model} was fetched without such a file."


def _report(files: list[PublishedFile], paths: list[Path]) -> str:
    lines = [f"{path}\n    {file.licence}" for file, path in zip(files, paths, strict=True)]
    return "\n".join([*lines, "Press R to refresh the lists of the loaders."])
