"""Prompt files as lists, which make ComfyUI run what comes after once for each entry."""

import hashlib
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..sana_core.prompts import PromptFile, read_prompts
from ..sana_core.resolution import INFERENCE_ASPECT_RATIOS, Size
from .notice import notice
from .sampling import seed_input

log = logging.getLogger(__name__)

_ENDINGS = (".txt", ".json")


class SanaPromptsFromFile(io.ComfyNode):
    """Prompt file to lists of prompts, sizes, seeds and names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaPromptsFromFile",
            display_name="Sana Prompts From File",
            category="sana/conditioning",
            description="Reads prompts from a file in ComfyUI's input folder. The nodes after it run once for each "
            "prompt, with its own size, seed and name.",
            search_aliases=["batch", "prompt list", "text file", "prompts from txt", "load prompts", "prompt queue"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_list_files(),
                    tooltip="A .txt file with a prompt a line, or a .json file, in ComfyUI's input folder. A prompt "
                    "may end in --ar height:width or --hw height:width.",
                ),
                io.Combo.Input(
                    "base_size",
                    options=[str(base) for base in INFERENCE_ASPECT_RATIOS],
                    default="1024",
                    tooltip="Size that the model was made for, in pixels: 256 for sana-nano, 512, 1024, 2048 or 4096. "
                    "Prompts without a size get a square of it, those with --ar its nearest official size.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    multiline=True,
                    tooltip="What to keep away from, for prompts without a negative prompt of their own.",
                ),
                seed_input(),
                io.Int.Input("start", default=1, min=1, max=1_000_000, tooltip="The first prompt to take, from 1."),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="How many prompts to take; 0 takes all the rest. The pictures of one run are held in "
                    "memory together, so take a long file in parts.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", is_output_list=True, tooltip="The prompts."),
                io.String.Output(
                    "negative", display_name="negative_prompt", is_output_list=True, tooltip="Their negative prompts."
                ),
                io.Int.Output(
                    "width", display_name="width", is_output_list=True, tooltip="Their widths, multiples of 32."
                ),
                io.Int.Output(
                    "height", display_name="height", is_output_list=True, tooltip="Their heights, multiples of 32."
                ),
                io.Int.Output(
                    "seed_of_prompt",
                    display_name="seed",
                    is_output_list=True,
                    tooltip="Their seeds: the same for all that have none of their own.",
                ),
                io.String.Output(
                    "name",
                    display_name="name",
                    is_output_list=True,
                    tooltip="A file name for each picture, for the filename prefix of Save Image.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        """In the place of ComfyUI's own check, which does not know what the input folder is for."""
        try:
            _find_file(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file, **_) -> str:
        """What the file holds, so that an edited one is read again."""
        return hashlib.sha256(_find_file(file).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, file, base_size, negative_prompt="", seed=0, start=1, count=0) -> io.NodeOutput:
        """The lists. Raises ValueError for a file without a prompt that can be drawn, or with none after `start`."""
        prompts = read_prompts(_find_file(file))
        remarks = [f"{file}, {remark}" for remark in (*prompts.faults, *prompts.notes)]
        entries = _part(prompts, start, count, remarks)
        for remark in remarks:
            log.warning(remark)
        base = int(base_size)
        sizes = [entry.size(base, Size(base, base)) for entry in entries]
        summary = f"{len(entries)} of {len(prompts.entries)} prompts"
        return io.NodeOutput(
            [entry.prompt for entry in entries],
            [negative_prompt if entry.negative_prompt is None else entry.negative_prompt for entry in entries],
            [size.width for size in sizes],
            [size.height for size in sizes],
            [seed if entry.seed is None else entry.seed for entry in entries],
            [entry.name for entry in entries],
            ui=notice("\n".join([summary, *remarks]), cls.hidden),
        )


def _part(prompts: PromptFile, start: int, count: int, remarks: list[str]):
    if not prompts.entries:
        raise ValueError("\n".join(["No prompt of the file can be drawn.", *remarks]))
    if start > len(prompts.entries):
        raise ValueError(f"start is {start}, but {prompts.path.name} has {len(prompts.entries)} prompts.")
    return prompts.entries[start - 1 :][: count or None]


def _list_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())


def _find_file(name: str) -> Path:
    """Path of a file that the node offers. Raises ValueError for any other."""
    folder = folder_paths.get_input_directory()
    if not isinstance(name, str) or not name:
        raise ValueError("No prompt file is chosen: put a .txt or .json file into ComfyUI's input folder, press R.")
    path = Path(folder, name)
    if not folder_paths.is_within_directory(folder, str(path)) or path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{name!r} is no .txt or .json file in ComfyUI's input folder.")
    if not path.is_file():
        raise ValueError(f"{name!r} is not in ComfyUI's input folder: put it there, and press R.")
    return path
