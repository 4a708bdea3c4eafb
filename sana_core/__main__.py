"""The command line: `python -m sana_core generate | convert`, each with --help."""

import argparse
import json
import logging
import os
import re
import secrets
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .checkpoint import load_dc_ae, load_transformer, save_dc_ae, save_transformer
from .pipeline import SanaPipeline
from .sampler.flow import SAMPLERS
from .sampler.guidance import PAG_OFF, parse_layers

logger = logging.getLogger(__name__)

NANO = Path(__file__).parents[1] / "models"  # the small model that ships with the pack
NANO_FILES = {
    "transformer": NANO / "diffusion_models" / "sana_nano.safetensors",
    "vae": NANO / "vae" / "dc_ae_nano.safetensors",
    "text_encoder": NANO / "text_encoders" / "gemma2_nano.safetensors",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VAE_TILING = {"auto": None, "always": True, "never": False}
CONVERTERS = {"transformer": (load_transformer, save_transformer), "vae": (load_dc_ae, save_dc_ae)}
METADATA_KEY = "sana"  # not "prompt", which ComfyUI reads as a graph when the picture is dropped on its canvas


def write_png(picture: Image.Image, path: Path, metadata: dict) -> None:
    """Write a picture with its metadata as JSON in a tEXt chunk; a file of that name is replaced only by a whole one.

    Raises OSError that says what could not be written, for example for want of space.
    """
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))  # escapes whatever tEXt, which is Latin-1, cannot hold
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write the picture ({error.strerror or error})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def generate(args: argparse.Namespace) -> None:
    """One picture for each prompt, all with the same seed, so that each can be made again on its own."""
    files = _model_files(args)
    paths = _output_paths(args.output, args.prompt)
    image = None if args.image is None else Image.open(args.image)
    pipe = _load_pipeline(args, files)
    for path, strength in args.lora:
        pipe.load_lora(path, strength)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    settings = _settings(args, pipe) | {"seed": seed}
    source = {} if image is None else {"image": args.image.name}
    vae_tiling = VAE_TILING[args.vae_tiling]  # not among the settings: the picture does not depend on it
    for prompt, path in zip(args.prompt, paths, strict=True):
        logger.info("seed %d: %s", seed, prompt)
        (picture,) = pipe(prompt, height=args.height, width=args.width, image=image, vae_tiling=vae_tiling, **settings)
        size = {"width": picture.width, "height": picture.height}
        notes = {"prompt": prompt, **source, **settings, **size, "models": _names(files), **_loras(args)}
        try:
            write_png(picture, path, notes)
        except OSError as error:
            raise OSError(f"{error}. Older files are whole; --seed {seed} draws the picture again") from error
        sys.stdout.write(f"{path}\n")


def _settings(args: argparse.Namespace, pipe: SanaPipeline) -> dict:
    """The options that this model's sampler has; the pipeline refuses those that it has not."""
    settings = {
        "num_inference_steps": pipe.default_steps if args.steps is None else args.steps,
        "guidance_scale": args.guidance_scale,
        "complex_human_instruction": args.instruction,
    }
    if args.image:
        settings["strength"] = args.strength
    if pipe.is_sprint:
        given = {"negative_prompt": args.negative_prompt, "shift": args.shift, **_guidance(args)}
        return settings | {name: value for name, value in given.items() if value and value != PAG_OFF}
    shift = pipe.shift if args.shift is None else args.shift
    own = {"negative_prompt": args.negative_prompt, "sampler": args.sampler, "shift": shift}
    return settings | own | _guidance(args)


def _guidance(args: argparse.Namespace) -> dict:
    return {
        "pag_guidance_scale": args.pag_scale,
        "pag_applied_layers": args.pag_layers,
        "guidance_interval": args.guidance_interval,
    }


def _model_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files asked for, those of the small model if none is. A part of one model does not fit those of another."""
    given = {name: getattr(args, name) for name in NANO_FILES}
    if args.model:
        if any(given.values()):
            raise ValueError("--model names a whole folder: leave out --transformer, --vae and --text-encoder")
        return {"model": args.model}
    if not any(given.values()):
        return NANO_FILES
    missing = [f"--{name.replace('_', '-')}" for name, path in given.items() if path is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: name all three files of the model, or none for sana-nano")
    return given


def _load_pipeline(args: argparse.Namespace, files: dict[str, Path]) -> SanaPipeline:
    options = {"variant": args.variant, "device": args.device, "dtype": DTYPES.get(args.dtype)}
    if "model" in files:
        return SanaPipeline.from_pretrained(files["model"], **options)
    return SanaPipeline.from_files(**files, **options)


def _names(files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in files.items()}


def _loras(args: argparse.Namespace) -> dict[str, list]:
    return {"loras": [[path.name, strength] for path, strength in args.lora]} if args.lora else {}


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


def convert(args: argparse.Namespace) -> None:
    """Rewrite the weights of one network in the layout asked for."""
    load, save = CONVERTERS[args.network]
    save(load(args.input, variant=args.variant, dtype=DTYPES.get(args.dtype)), args.output, layout=args.to)
    sys.stdout.write(f"{args.output}\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can put right is one line on stderr, without traceback."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        args.run(args)
    except (ValueError, OSError, FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sana_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="generate | convert")
    _add_generate(commands)
    _add_convert(commands)
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="draw pictures of prompts",
        description="Draw a picture of each prompt and write it as PNG, with its settings in the file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="what to draw; repeat the option for more pictures")
    add("--negative-prompt", default="", help="what to keep away from; not for Sprint")
    add("--image", type=Path, help="a picture to start from; Sprint only")
    add("--strength", type=float, default=0.5, help="the share of the steps that --image is put through")
    add("--output", type=Path, default=Path("output"), help="a PNG, or a folder that gets sana_00001.png and so on")
    add("--transformer", type=Path, help="file or folder; the default is the sana-nano that ships with the pack")
    add("--vae", type=Path, help="file or folder of the DC-AE autoencoder")
    add("--text-encoder", type=Path, help="file or folder of Gemma-2")
    add("--model", type=Path, help="a folder in the diffusers layout instead of the three files")
    add("--variant", help="name of the preset, where the transformer's file alone cannot tell")
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
    add("--seed", type=int, help="of the noise; the default is another one each time")
    add(
        "--vae-tiling",
        choices=list(VAE_TILING),
        default="auto",
        help="decode in tiles, to the same picture in less memory; auto does so when a GPU's memory is short",
    )
    add("--device", type=_device, help="cuda, cpu ...; the default is a GPU if there is one")
    add("--dtype", choices=list(DTYPES), help="of the weights; the default is the files', float32 on a CPU")
    add("--verbose", action="store_true", help="say what was loaded, and why so")
    parser.set_defaults(run=generate)


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="rewrite weights in another layout",
        description="Rewrite a transformer or an autoencoder as safetensors, under the official keys or diffusers'.",
    )
    add = parser.add_argument
    add("network", choices=list(CONVERTERS), help="what the input holds")
    add("input", type=Path, help="file or folder in either layout")
    add("output", type=Path, help="a .safetensors file; for diffusers also a folder, which then gets config.json too")
    add("--to", choices=["official", "diffusers"], required=True, help="layout")
    add("--variant", help="name of the preset, where the input alone cannot tell")
    add("--dtype", choices=list(DTYPES), help="of the weights; the default is the input's")
    add("--verbose", action="store_true", help="say what was detected, and why so")
    parser.set_defaults(run=convert)


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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name} asked for, but PyTorch {torch.__version__} finds no usable GPU")
    return device


if __name__ == "__main__":
    sys.exit(main())
