"""Weights on disk: read, detect, convert keys, load strictly, save.

`load_*` make a model of a file or folder; `read_*` stop before the model is built; `detect_*` and `convert_*` work on
state dicts that are already in memory.
"""

from .configuration import CONFIG_KEY, config_tensor, dump_config, read_shift
from .detection import detect_controlnet, detect_dc_ae, detect_transformer
from .families import DC_AE_ANCHORS, TRANSFORMER_ANCHORS, describe_keys, strip_prefix
from .files import CheckpointError, read_state_dict
from .gemma import load_text_encoder, load_tokenizer, save_text_encoder
from .keys import convert_controlnet, convert_dc_ae, convert_transformer
from .lora import Lora, convert_lora, read_lora
from .quantization import scaled_layers, without_scales
from .weights import (
    check_weights,
    load_controlnet,
    load_dc_ae,
    load_transformer,
    read_controlnet,
    read_dc_ae,
    read_transformer,
    save_controlnet,
    save_dc_ae,
    save_transformer,
)

__all__ = [
    "CONFIG_KEY",
    "DC_AE_ANCHORS",
    "TRANSFORMER_ANCHORS",
    "CheckpointError",
    "Lora",
    "check_weights",
    "config_tensor",
    "convert_controlnet",
    "convert_dc_ae",
    "convert_lora",
    "convert_transformer",
    "describe_keys",
    "detect_controlnet",
    "detect_dc_ae",
    "detect_transformer",
    "dump_config",
    "load_controlnet",
    "load_dc_ae",
    "load_text_encoder",
    "load_tokenizer",
    "load_transformer",
    "read_controlnet",
    "read_dc_ae",
    "read_lora",
    "read_shift",
    "read_state_dict",
    "read_transformer",
    "save_controlnet",
    "save_dc_ae",
    "save_text_encoder",
    "save_transformer",
    "scaled_layers",
    "strip_prefix",
    "without_scales",
]
