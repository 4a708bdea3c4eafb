"""A folder of pictures and captions to train on."""

import hashlib
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..sana_core.resolution import ASPECT_RATIOS
from ..sana_core.training.captions import OFFICIAL_CHOICE, CaptionChoice
from ..sana_core.training.dataset import read_dataset
from ..sana_core.training.report import report
from .clip import PromptTokenizer

log = logging.getLogger(__name__)

DatasetType = io.Custom("SANA_DATASET")  # sana_core's Dataset: paths, captions and buckets, no pixels


class SanaDataset(io.ComfyNode):
    """Folder to SANA_DATASET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDataset",
            display_name="Sana Dataset",
            category="sana/training",
            description="Reads the pictures and captions of a folder in ComfyUI's input folder to train on, and shows "
            "how many go to which size, how long the captions are, and what is wrong with which file.",
            search_aliases=["load dataset", "training data", "image caption folder", "finetune", "webdataset"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders(),
                    tooltip="Folder in ComfyUI's input folder: AAA.png with its caption in AAA.txt, metadata.jsonl, "
                    "meta_data.json, or .tar files. Press R after you have put a new one there.",
                ),
                io.Combo.Input(
                    "resolution",
                    options=[str(base) for base in ASPECT_RATIOS],
                    default="1024",
                    tooltip="Size to train at, in pixels: each picture is scaled and cut to the nearest ratio of its "
                    "official table. 256 for sana-nano, else the model's own size.",
                ),
                io.String.Input(
                    "missing_captions",
                    default="skip",
                    optional=True,
                    advanced=True,
                    tooltip="What becomes of pictures without a caption: skip, error, empty, filename, or text: and "
                    "the caption for all of them.",
                ),
                io.Float.Input(
                    "min_score",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures whose captions all have a CLIP score below it are left out. Captions without a "
                    "score count as good enough.",
                ),
                io.Boolean.Input(
                    "decode",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Decode every picture now, which finds damaged and double ones. Off, damaged ones are "
                    "found while training prepares them.",
                ),
                io.Float.Input(
                    "caption_threshold",
                    default=OFFICIAL_CHOICE.threshold,
                    min=0.0,
                    max=100.0,
                    optional=True,
                    advanced=True,
                    tooltip="Where a picture has several captions with CLIP scores: those that score lower are drawn "
                    "only if all do.",
                ),
                io.Float.Input(
                    "caption_temperature",
                    default=OFFICIAL_CHOICE.temperature,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Where a picture has several captions with CLIP scores, one is drawn with weight "
                    "score^(1 / temperature): near 0 always the best, 1 by the score, high nearly alike.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load Sana Text Encoder: counts the captions' tokens, and names those that are too "
                    "long.",
                ),
            ],
            outputs=[DatasetType.Output("dataset", display_name="SANA_DATASET", tooltip="For Sana Trainer.")],
        )

    @classmethod
    def validate_inputs(cls, folder) -> bool | str:
        """In the place of ComfyUI's own check, whose list of folders is as old as the server."""
        try:
            _find_folder(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> str:
        """Which files the folder holds, and as of when, so that a changed one is read again."""
        digest = hashlib.sha256()
        for path in sorted(_find_folder(folder).rglob("*")):
            status = path.lstat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @classmethod
    def execute(
        cls,
        folder,
        resolution,
        missing_captions="skip",
        min_score=0.0,
        caption_threshold=OFFICIAL_CHOICE.threshold,
        caption_temperature=OFFICIAL_CHOICE.temperature,
        decode=True,
        clip=None,
    ) -> io.NodeOutput:
        """The data set, and the report as text. Raises DatasetError if nothing in it is usable."""
        dataset = read_dataset(
            _find_folder(folder),
            int(resolution),
            missing_captions=missing_captions.strip(),
            min_score=min_score,
            choice=CaptionChoice(caption_threshold, caption_temperature),
            decode=decode,
        )
        text = report(dataset, _tokenizer(clip))
        log.info("%s", text)
        return io.NodeOutput(dataset, ui=ui.PreviewText(text))


def _find_folder(name: str) -> Path:
    """Path of a folder below ComfyUI's input folder. Raises ValueError for any other."""
    base = folder_paths.get_input_directory()
    if not isinstance(name, str) or not name:
        raise ValueError(
            "No folder is chosen: put one with pictures and captions into ComfyUI's input folder, and press R."
        )
    path = Path(base, name)
    if not folder_paths.is_within_directory(base, str(path)):
        raise ValueError(f"{name!r} is not within ComfyUI's input folder.")
    if not path.is_dir():
        raise ValueError(f"{name!r} is no folder in ComfyUI's input folder: put it there, and press R.")
    return path


def _tokenizer(clip):
    if clip is None:
        return None
    if not isinstance(clip.tokenizer, PromptTokenizer):
        raise ValueError("The captions' tokens are counted by the CLIP of Load Sana Text Encoder: connect that one.")
    return clip.tokenizer.tokenizer
