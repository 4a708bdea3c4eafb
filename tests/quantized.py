"""Files with layers in 8-bit floats, in each of the spellings that ComfyUI's tools have used, made by hand."""

import json

import torch
from safetensors.torch import save_file

from sana_core.checkpoint import dump_config

SPELLINGS = ("comfy_quant", "scaled_fp8", "metadata")


def as_bytes(content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def quantized(weight, dtype=torch.float8_e4m3fn):
    """The weight in 8 bits and its scale, by which the largest value is the largest that the format has."""
    scale = weight.abs().max() / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def save_quantized(model, path, layers, spelling="comfy_quant", dtype=torch.float8_e4m3fn, prefix=""):
    """Write the model with some of its layers in 8 bits; returns all weights as they are meant to be read, float32."""
    state_dict = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = dict(state_dict)
    formats = {}
    for layer in layers:
        weight, scale = quantized(state_dict[f"{layer}.weight"], dtype)
        expected[f"{layer}.weight"] = weight.float() * scale
        state_dict[f"{layer}.weight"] = weight
        state_dict[f"{layer}.{'scale_weight' if spelling == 'scaled_fp8' else 'weight_scale'}"] = scale
        formats[layer] = {"format": str(dtype).removeprefix("torch.")}
        if spelling == "comfy_quant":
            state_dict[f"{layer}.comfy_quant"] = as_bytes(formats[layer])
    metadata = {"sana_config": dump_config(model.config)}
    if spelling == "scaled_fp8":
        state_dict["scaled_fp8"] = torch.empty(2, dtype=dtype)
    if spelling == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": formats})
    save_file({prefix + key: tensor for key, tensor in state_dict.items()}, path, metadata=metadata)
    return expected
