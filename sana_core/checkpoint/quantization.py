"""Layers stored in 8-bit floats with a scale of their own, as ComfyUI and its converters write them.

Beside `X.weight` such a file has `X.weight_scale`, and `X.comfy_quant`, a JSON object as bytes that names the format.
Older files have `X.scale_weight` and a `scaled_fp8` marker instead; others keep the formats in their metadata.
Source of the names: ComfyUI's QUANTIZATION.md and `comfy/utils.py`, for the facts.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .files import CheckpointError, StateDict

FORMAT = ".comfy_quant"
SCALE = ".weight_scale"
EXTRAS = (FORMAT, SCALE, ".input_scale")
_OLD_NAMES = {".scale_weight": SCALE, ".scale_input": ".input_scale"}
_MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"
_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def with_formats(state_dict: StateDict, metadata: dict[str, str]) -> StateDict:
    """The same weights with today's names for the scales, and with the format of each scaled layer."""
    renamed = {_today(key): tensor for key, tensor in state_dict.items() if not f".{key}".endswith(f".{_MARKER}")}
    for layer, options in json.loads(metadata.get(_METADATA, "{}")).get("layers", {}).items():
        renamed.setdefault(layer + FORMAT, _encode(options))
    for layer in [key.removesuffix(SCALE) for key in renamed if key.endswith(SCALE)]:
        if layer + FORMAT not in renamed and f"{layer}.weight" in renamed:
            dtype = renamed[f"{layer}.weight"].dtype
            renamed[layer + FORMAT] = _encode({"format": str(dtype).removeprefix("torch.")})
    return renamed


def _today(key: str) -> str:
    old = next((name for name in _OLD_NAMES if key.endswith(name)), None)
    return key if old is None else key.removesuffix(old) + _OLD_NAMES[old]


def _encode(options: dict) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(options).encode()), dtype=torch.uint8)


def scaled_layers(keys: Iterable[str]) -> list[str]:
    """Names of the layers that are stored with a format of their own."""
    return [key.removesuffix(FORMAT) for key in keys if key.endswith(FORMAT)]


def without_scales(state_dict: StateDict) -> StateDict:
    """The weights alone."""
    extras = {layer + extra for layer in scaled_layers(state_dict) for extra in EXTRAS}
    return {key: tensor for key, tensor in state_dict.items() if key not in extras}


def dequantize(state_dict: StateDict, path: str | Path, *, keep_linear: bool = False) -> None:
    """Multiply scaled layers out to bfloat16, in `state_dict` itself.

    keep_linear: leave linear layers as they are, for ComfyUI, which computes with them but knows no others.

    Raises:
        CheckpointError: a layer that is not in 8-bit floats, or that lacks its weight.
    """
    for layer in scaled_layers(state_dict):
        weight = state_dict.get(f"{layer}.weight")
        stored = json.loads(bytes(state_dict[layer + FORMAT].tolist())).get("format")
        if weight is None or _FLOAT8.get(stored) != weight.dtype:
            found = "without a weight" if weight is None else f"stored as {stored} in {weight.dtype}"
            raise CheckpointError(
                f"{path}: the layer {layer} is {found}. Of quantised layers, those in {' and '.join(_FLOAT8)} can be "
                "read. Choose a file in one of these, or in bfloat16."
            )
        if keep_linear and weight.ndim == 2:
            continue
        scale, *_ = (state_dict.pop(layer + extra, None) for extra in (SCALE, FORMAT, ".input_scale"))
        scaled = weight.float() if scale is None else weight.float() * _along_rows(scale.float(), weight)
        state_dict[f"{layer}.weight"] = scaled.bfloat16()


def _along_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """One scale for all, or one for each row, so that it multiplies the weight."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
