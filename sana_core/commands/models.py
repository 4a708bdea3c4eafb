"""The options that name the three networks of a model, and the pipeline that they give."""

import argparse
from pathlib import Path

import torch

from ..hub import fetch_model
from ..pipeline import SanaPipeline
from ..text import CaptionCache

NANO = Path(__file__).parents[2] / "models"  # the small model that ships with the pack
NANO_FILES = {
    "transformer": NANO / "diffusion_models" / "sana_nano.safetensors",
    "vae": NANO / "vae" / "dc_ae_nano.safetensors",
    "text_encoder": NANO / "text_encoders" / "gemma2_nano.safetensors",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_options(parser: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """Declare the options that `model_files` and `load_pipeline` read; `dtype`: whether weights have one to choose."""
    add = parser.add_argument
    add("--transformer", type=Path, help="file or folder; the default is the sana-nano that ships with the pack")
    add("--vae", type=Path, help="file or folder of the DC-AE autoencoder")
    add("--text-encoder", type=Path, help="file or folder of Gemma-2")
    add("--model", type=Path, help="instead of the three: a folder in the diffusers layout, or a name of `download`")
    add("--variant", help="name of the preset, where the transformer's file alone cannot tell")
    add("--device", type=_device, help="cuda, cpu ...; the default is a GPU if there is one")
    if dtype:
        add(
            "--dtype",
            choices=list(DTYPES),
            help="of the weights; the default is the files', on a CPU mostly float32",
        )


def model_files(args: argparse.Namespace) -> dict[str, Path]:
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


def component_paths(files: dict[str, Path]) -> dict[str, Path]:
    """Where each of the three networks is, of what `model_files` returned; a published model is fetched.

    Raises ValueError for a name that is neither a folder nor a published model, DownloadError.
    """
    if "model" not in files:
        return files
    if files["model"].is_dir():
        return {name: files["model"] / name for name in NANO_FILES}
    return fetch_model(str(files["model"]))


def load_pipeline(args: argparse.Namespace, files: dict[str, Path]) -> SanaPipeline:
    """The pipeline of `model_files`, where and in the dtype that the options say.

    It encodes a text that returns, such as the negative prompt of many pictures, only once.
    """
    options = {"variant": args.variant, "device": args.device, "dtype": DTYPES.get(args.dtype)}
    if "model" in files:
        pipe = SanaPipeline.from_pretrained(files["model"], **options)
    else:
        pipe = SanaPipeline.from_files(**files, **options)
    pipe.text_encoder = CaptionCache(pipe.text_encoder)  # no command changes the encoder's weights
    return pipe


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name} asked for, but PyTorch {torch.__version__} finds no usable GPU")
    return device
