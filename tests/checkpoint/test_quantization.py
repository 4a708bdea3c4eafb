"""Weights in 8 bits with scales become what their author multiplied out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_core.checkpoint import (
    CheckpointError,
    dump_config,
    load_transformer,
    read_transformer,
    scaled_layers,
    without_scales,
)
from tests import quantized, tiny

LAYERS = ("blocks.0.attn.qkv", "blocks.1.cross_attn.proj", "blocks.1.mlp.point_conv.conv")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("spelling", quantized.SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_is_multiplied_out(path, spelling, dtype):
    expected = quantized.save_quantized(tiny.transformer(), path, LAYERS, spelling, dtype)
    _, state_dict = read_transformer(path)
    assert state_dict.keys() == expected.keys()
    for key, tensor in expected.items():
        scaled = key.removesuffix(".weight") in LAYERS
        assert torch.equal(state_dict[key], tensor.bfloat16() if scaled else tensor)
    assert load_transformer(path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("spelling", ["comfy_quant", "scaled_fp8"])
def test_a_prefix_makes_no_difference(path, spelling):
    expected = quantized.save_quantized(tiny.transformer(), path, LAYERS, spelling, prefix="model.diffusion_model.")
    assert read_transformer(path)[1].keys() == expected.keys()


@pytest.mark.parametrize("spelling", quantized.SPELLINGS)
def test_linear_layers_may_stay_as_they_are(path, spelling):
    expected = quantized.save_quantized(tiny.transformer(), path, LAYERS, spelling)
    _, state_dict = read_transformer(path, keep_quantized=True)
    assert without_scales(state_dict).keys() == expected.keys()
    assert set(scaled_layers(state_dict)) == set(LAYERS[:2]), "ComfyUI has no scaled convolutions"
    for layer in LAYERS[:2]:
        weight, scale = state_dict[f"{layer}.weight"], state_dict[f"{layer}.weight_scale"]
        assert weight.dtype == torch.float8_e4m3fn
        assert torch.equal(weight.float() * scale, expected[f"{layer}.weight"])
        assert json.loads(bytes(state_dict[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}


def test_a_scale_for_each_row(path):
    quantized.save_quantized(tiny.transformer(), path, LAYERS)
    tensors = load_file(path)
    rows = torch.rand(len(tensors["blocks.0.attn.qkv.weight"]), 1)
    save_file({**tensors, "blocks.0.attn.qkv.weight_scale": rows}, path, metadata=_metadata())
    _, state_dict = read_transformer(path)
    expected = (tensors["blocks.0.attn.qkv.weight"].float() * rows).bfloat16()
    assert torch.equal(state_dict["blocks.0.attn.qkv.weight"], expected)


def test_other_formats_are_refused_by_name(path):
    quantized.save_quantized(tiny.transformer(), path, LAYERS)
    tensors = load_file(path)
    tensors["blocks.0.attn.qkv.comfy_quant"] = quantized.as_bytes({"format": "nvfp4"})
    save_file(tensors, path, metadata=_metadata())
    with pytest.raises(CheckpointError, match="blocks.0.attn.qkv is stored as nvfp4.*float8_e4m3fn and float8_e5m2"):
        read_transformer(path)


def test_a_scale_without_its_weight_is_refused(path):
    quantized.save_quantized(tiny.transformer(), path, LAYERS)
    tensors = load_file(path)
    del tensors["blocks.1.cross_attn.proj.weight"]
    save_file(tensors, path, metadata=_metadata())
    with pytest.raises(CheckpointError, match="blocks.1.cross_attn.proj is without a weight"):
        read_transformer(path)


def _metadata():
    return {"sana_config": dump_config(tiny.TRANSFORMER)}
