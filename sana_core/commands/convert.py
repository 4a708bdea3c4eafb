"""`convert`: the weights of one network in another layout."""

import argparse
import sys
from pathlib import Path

from ..checkpoint import (
    load_controlnet,
    load_dc_ae,
    load_transformer,
    save_controlnet,
    save_dc_ae,
    save_transformer,
)
from .models import DTYPES

CONVERTERS = {
    "transformer": (load_transformer, save_transformer),
    "vae": (load_dc_ae, save_dc_ae),
    "controlnet": (load_controlnet, save_controlnet),
}


def add_parser(commands) -> None:
    """Declare `convert` among the commands."""
    parser = commands.add_parser(
        "convert",
        help="rewrite weights in another layout",
        description="Rewrite a transformer or an autoencoder as safetensors, under the official keys or diffusers'. "
        "Of a ControlNet the branch alone is written, under the official keys, without the base model's weights.",
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


def convert(args: argparse.Namespace) -> None:
    """Rewrite the weights of one network in the layout asked for."""
    load, save = CONVERTERS[args.network]
    save(load(args.input, variant=args.variant, dtype=DTYPES.get(args.dtype)), args.output, layout=args.to)
    sys.stdout.write(f"{args.output}\n")
