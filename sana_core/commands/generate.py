"""`generate`: pictures of prompts, as PNG with their settings inside."""

import argparse
import logging
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..pictures import write_png
from ..pipeline import SanaPipeline
from ..sampler.flow import SAMPLERS
from ..sampler.guidance import PAG_OFF, parse_layers
from ..styles import NO_STYLE, STYLES, apply_style
from .batch import add_file_options, draw_prompt_file, read_prompt_file
from .best_of import Drawer, add_best_of_options, asked_choice, load_drawer
from .models import add_model_options, load_pipeline, model_files
from .ranks import own_device, require_one_process

logger = logging.getLogger(__name__)

VAE_TILING = {"auto": None, "always": True, "never": False}


def add_parser(commands) -> None:
    """Declare `generate` among the commands."""
    parser = commands.add_parser(
        "generate",
        help="draw pictures of prompts",
        description="Draw a picture of each prompt and write it as PNG, with its settings in the file.",
    )
    add_drawing_options(parser)
    parser.set_defaults(run=generate)


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `load_drawing` and its drawing read."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="what to draw; repeat the option for more pictures")
    add_file_options(source)
    add("--negative-prompt", default="", help="what to keep away from; not for Sprint")
    add("--style", choices=list(STYLES), default=NO_STYLE, help="words of the official demo for prompt and negative")
    add("--image", type=Path, help="a picture to start from, scaled and cut to the size")
    add("--mask", type=Path, help="a picture, white where --image is to be drawn anew; the rest of it stays")
    add(
        "--strength",
        type=float,
        help="the share of the steps that --image is put through; the default is 0.5, and 1 with --mask",
    )
    add("--controlnet", type=Path, help="file or folder of a ControlNet, which follows --control-image")
    add("--control-image", type=Path, help="the lines to follow, white on black for HED; scaled and cut to the size")
    add("--control-strength", type=float, help="how strictly to follow them; the default is 1")
    add(
        "--output",
        type=Path,
        default=Path("output"),
        help="a PNG, or a folder that gets sana_00001.png and so on; with a file, pictures are named by their prompts",
    )
    add_model_options(parser)
    add(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="a LoRA file for the transformer, at strength 1 if none is given; repeat the option for more",
    )
    add("--height", type=int, help="pixels, a multiple of 32; the default is the model's own size")
    add("--width", type=int, help="pixels, a multiple of 32; the default is the model's own size")
    add("--steps", type=int, help="of the sampler; the default is 20, or 2 for Sprint")
    add("--guidance-scale", type=float, default=4.5, help="how closely to follow the prompt; 1 switches guidance off")
    add(
        "--pag-scale",
        type=float,
        default=PAG_OFF,
        help="of perturbed-attention guidance, which counts above 1: more coherent shapes in 1.5 times the time",
    )
    add("--pag-layers", type=_layers, metavar="8,14", help="blocks that it perturbs; the default is the model's own")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide between these noise levels of 0 to 1 only, which saves time; not with --pag-scale",
    )
    add("--sampler", choices=list(SAMPLERS), default="flow_dpm-solver", help="method; Sprint has its own")
    add("--shift", type=float, help="of the schedule; the default is the model's own; not for Sprint")
    add("--no-instruction", dest="instruction", action="store_false", help="encode the prompt without the instruction")
    add("--seed", type=int, help="of the noise; the default is another one each time, and 0 with a file")
    add(
        "--vae-tiling",
        choices=list(VAE_TILING),
        default="auto",
        help="decode in tiles, to the same picture in less memory; auto does so when a GPU's memory is short",
    )
    add_best_of_options(parser)
    add("--verbose", action="store_true", help="say what was loaded, and why so")


def generate(args: argparse.Namespace) -> None:
    """One picture for each prompt, all with the same seed, so that each can be made again on its own."""
    _check_control(args)
    model_files(args)  # refuses what does not fit before a folder is made
    if args.prompt is None:
        prompts = read_prompt_file(args)  # before the models, which take longer to load than a mistake to show
        draw_prompt_file(prompts, args, load_drawing(args))
        return
    require_one_process()
    paths = _output_paths(args.output, args.prompt)
    drawing = load_drawing(args)
    args.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    for prompt, path in zip(args.prompt, paths, strict=True):
        try:
            drawing.draw(prompt, args, path)
        except OSError as error:
            raise OSError(f"{error}. Older files are whole; --seed {args.seed} draws the picture again") from error


@dataclass(frozen=True)
class Drawing:
    """The loaded model, and what all pictures of a command start from."""

    pipe: SanaPipeline
    files: dict[str, Path]  # of the model
    source: dict[str, Image.Image]  # by the pipeline's names for them
    draw_one: Drawer  # the pipeline, or the best of several of its pictures

    def draw(self, prompt: str, args: argparse.Namespace, path: Path) -> None:
        """Draw one picture, write it and tell its path. Raises what the pipeline raises, and OSError."""
        styled, _ = apply_style(args.style, prompt)
        logger.info("seed %d: %s", args.seed, styled)
        picture, choice = self.draw_one(
            styled,
            height=args.height,
            width=args.width,
            vae_tiling=VAE_TILING[args.vae_tiling],  # not among the settings: the picture does not depend on it
            **self.source,
            **_settings(args, self.pipe),
        )
        write_png(picture, path, self.notes(prompt, args, picture.size) | choice)
        sys.stdout.write(f"{path}\n")

    def notes(self, prompt: str, args: argparse.Namespace, size: tuple[int, int]) -> dict:
        """What the file of a picture (width, height) says about it: all that it depends on."""
        names = {name: path.name for name, path in _source_paths(args).items()}
        sides = dict(zip(("width", "height"), size, strict=True))
        return {
            "prompt": apply_style(args.style, prompt)[0],
            **names,
            **_settings(args, self.pipe),
            **sides,
            **asked_choice(args),
            "models": _names(self.files),
            **_additions(args),
        }


def load_drawing(args: argparse.Namespace) -> Drawing:
    """The model that the options name, with its LoRAs, the pictures to start from, and what chooses among several."""
    files = model_files(args)
    source = {name: Image.open(path) for name, path in _source_paths(args).items()}
    args.device = own_device(args.device)
    pipe = load_pipeline(args, files)
    for path, strength in args.lora:
        pipe.load_lora(path, strength)
    if args.controlnet:
        pipe.load_controlnet(args.controlnet)
        files = files | {"controlnet": args.controlnet}
    return Drawing(pipe, files, source, load_drawer(args, pipe))


def _source_paths(args: argparse.Namespace) -> dict[str, Path]:
    """The pictures that the drawing starts from or follows, by the pipeline's names for them."""
    return {name: path for name in ("image", "mask", "control_image") if (path := getattr(args, name))}


def _check_control(args: argparse.Namespace) -> None:
    if bool(args.controlnet) != bool(args.control_image):
        raise ValueError("--controlnet and --control-image belong together: give both, or neither")
    if args.control_strength is not None and not args.controlnet:
        raise ValueError("--control-strength given without --controlnet and --control-image")


def _settings(args: argparse.Namespace, pipe: SanaPipeline) -> dict:
    """The options that this model's sampler has; the pipeline refuses those that it has not."""
    settings = {
        "num_inference_steps": pipe.default_steps if args.steps is None else args.steps,
        "guidance_scale": args.guidance_scale,
        "complex_human_instruction": args.instruction,
        "seed": args.seed,
    }
    if args.strength is not None:
        settings["strength"] = args.strength
    if args.control_strength is not None:
        settings["control_strength"] = args.control_strength
    if pipe.is_sprint:
        given = {"negative_prompt": args.negative_prompt, "shift": args.shift, **_guidance(args)}
        return settings | {name: value for name, value in given.items() if value and value != PAG_OFF}
    shift = pipe.shift if args.shift is None else args.shift
    _, negative_prompt = apply_style(args.style, "", args.negative_prompt)
    own = {"negative_prompt": negative_prompt, "sampler": args.sampler, "shift": shift}
    return settings | own | _guidance(args)


def _guidance(args: argparse.Namespace) -> dict:
    return {
        "pag_guidance_scale": args.pag_scale,
        "pag_applied_layers": args.pag_layers,
        "guidance_interval": args.guidance_interval,
    }


def _names(files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in files.items()}


def _additions(args: argparse.Namespace) -> dict:
    """What was asked for beside the models and the prompt as it stands, which has the style's words in it."""
    loras = {"loras": [[path.name, strength] for path, strength in args.lora]} if args.lora else {}
    return loras if args.style == NO_STYLE else {**loras, "style": args.style}


def _output_paths(output: Path, prompts: list[str]) -> list[Path]:
    """A path for each prompt: the PNG itself, or new names in the folder. Makes the folder."""
    if output.suffix.lower() == ".png":
        if len(prompts) > 1:
            raise ValueError(f"{len(prompts)} prompts do not fit in {output}: name a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in output.iterdir() if (match := re.fullmatch(r"sana_(\d+)\.png", path.name))]
    first = max(taken, default=0) + 1
    return [output / f"sana_{first + index:05d}.png" for index in range(len(prompts))]


def _layers(text: str) -> list[int]:
    try:
        return parse_layers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _lora(text: str) -> tuple[Path, float]:
    """Path and strength; a colon may also belong to the path."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
