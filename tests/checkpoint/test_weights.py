import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sana_core.checkpoint import (
    CONFIG_KEY,
    CheckpointError,
    config_tensor,
    convert_dc_ae,
    convert_transformer,
    load_dc_ae,
    load_transformer,
    save_dc_ae,
    save_transformer,
)
from sana_core.checkpoint.configuration import dc_ae_to_diffusers, transformer_to_diffusers
from sana_core.checkpoint.keys import dc_ae_rules, official_to_diffusers, transformer_rules
from sana_core.config import AUTOENCODERS, TRANSFORMERS
from sana_core.kernels import REFERENCE
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from tests import tiny

ROOT = Path(__file__).parents[2]
TRANSFORMERS_BUILT = {
    "1.0": {},
    "1.5": {"qk_norm": True},
    "sprint": {"qk_norm": True, "guidance_embed": True},
    "teacher": {"qk_norm": True, "timestep_scale": 0.001},
    "4K": {"pos_embed_base": 3, "pos_embed_interpolation": 2.0},
}
AUTOENCODERS_BUILT = {
    "nano": {},
    "sana": {
        "encoder_depths": (1,) * 6,
        "decoder_depths": (1,) * 6,
        "multiscale": True,
        "downsample": "conv",
        "upsample": "interpolate",
    },
    "lite": {"encoder_depths": (1,) * 6, "downsample": "conv", "multiscale": True, "decoder_out_act": "silu"},
    "mix": {"decoder_batch_norm": (True, True, True, False, False, False)},
}
KINDS = {
    "transformer": SimpleNamespace(
        build=tiny.transformer,
        load=load_transformer,
        save=save_transformer,
        rules=transformer_rules,
        convert=convert_transformer,
        to_diffusers=transformer_to_diffusers,
        diffusers=SanaTransformer2DModel,
    ),
    "dc_ae": SimpleNamespace(
        build=tiny.dc_ae,
        load=load_dc_ae,
        save=save_dc_ae,
        rules=dc_ae_rules,
        convert=convert_dc_ae,
        to_diffusers=dc_ae_to_diffusers,
        diffusers=AutoencoderDC,
    ),
}
MODELS = [("transformer", name) for name in TRANSFORMERS_BUILT] + [("dc_ae", name) for name in AUTOENCODERS_BUILT]


def build(kind, name):
    changes = TRANSFORMERS_BUILT[name] if kind == "transformer" else AUTOENCODERS_BUILT[name]
    return KINDS[kind], KINDS[kind].build(**changes)


def assert_same(model, expected, dtype=None):
    found, wanted = model.state_dict(), expected.state_dict()
    assert model.config == expected.config and not model.training
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("kind, name", MODELS)
@pytest.mark.parametrize(
    "layout, target", [("official", "m.safetensors"), ("diffusers", "m.safetensors"), ("diffusers", "m")]
)
def test_round_trip_is_bit_equal(kind, name, layout, target, tmp_path):
    functions, model = build(kind, name)
    functions.save(model, tmp_path / target, layout=layout)
    assert_same(functions.load(tmp_path / target), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_file_is_kept(tmp_path, dtype):
    save_transformer(tiny.transformer().to(dtype), tmp_path / "m.safetensors")
    loaded = load_transformer(tmp_path / "m.safetensors")
    assert loaded.dtype == dtype
    assert_same(loaded, tiny.transformer().to(dtype))


@pytest.mark.parametrize("kind, name", [("transformer", "sprint"), ("dc_ae", "mix")])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_weights_are_cast_and_counters_are_not(kind, name, layout, tmp_path):
    functions, model = build(kind, name)
    functions.save(model, tmp_path / "m.safetensors", layout=layout)
    assert_same(functions.load(tmp_path / "m.safetensors", dtype=torch.bfloat16), model, torch.bfloat16)


def test_odd_tensors_of_another_dtype_are_unified(tmp_path):
    model = tiny.transformer().to(torch.bfloat16)
    state_dict = model.state_dict() | {"attention_y_norm.weight": model.attention_y_norm.weight.float()}
    save_file(state_dict, tmp_path / "m.safetensors", metadata={CONFIG_KEY: json.dumps(vars(model.config))})
    assert_same(load_transformer(tmp_path / "m.safetensors"), model)


@pytest.mark.parametrize("kind, name", MODELS)
def test_diffusers_opens_what_is_saved(kind, name, tmp_path):
    functions, model = build(kind, name)
    functions.save(model, tmp_path / "model", layout="diffusers")
    opened, report = functions.diffusers.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    back = functions.convert(dict(opened.state_dict()), "diffusers")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind, name", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}, {"variant": "bf16", "max_shard_size": "100KB"}])
def test_folders_that_diffusers_wrote(kind, name, options, tmp_path):
    functions, model = build(kind, name)
    theirs = functions.diffusers.from_config(functions.to_diffusers(model.config))
    state_dict = model.state_dict()
    theirs.load_state_dict(official_to_diffusers(state_dict, functions.rules(state_dict)))
    folder = tmp_path / {"transformer": "transformer", "dc_ae": "vae"}[kind]
    theirs.save_pretrained(folder, **options)
    assert not options or len(list(folder.glob("*-of-*"))) > 1
    for path in (folder, tmp_path):
        found, wanted = functions.load(path).state_dict(), model.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    # Diffusers' file does not say our sampling defaults; what changes the network must be the same.
    assert functions.to_diffusers(functions.load(folder).config) == functions.to_diffusers(model.config)


def test_published_pth(tmp_path):
    """The authors' container: fp32, a wrapper, and buffers that are no weights. Its shapes are enough."""
    model = tiny.filled(SanaTransformer(TRANSFORMERS["sana-nano"]))
    buffers = {"pos_embed": torch.zeros(1, 64, 192), "y_embedder.y_embedding": torch.zeros(300, 192)}
    torch.save({"state_dict": buffers | model.state_dict()}, tmp_path / "m.pth")
    assert_same(load_transformer(tmp_path / "m.pth"), model)


def test_official_repository_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model = tiny.filled(SanaTransformer(TRANSFORMERS["sana-nano"]))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoints" / "m.pth")
    assert_same(load_transformer(tmp_path), model)


@pytest.mark.parametrize("kind, prefix", [("transformer", "model.diffusion_model."), ("dc_ae", "first_stage_model.")])
def test_what_comfyui_saves(kind, prefix, tmp_path):
    """It puts a prefix before every key and drops metadata, so the configuration comes along as a tensor."""
    functions, model = build(kind, next(name for found, name in MODELS if found == kind))
    state_dict = model.state_dict() | {CONFIG_KEY: config_tensor(model.config)}
    save_file({prefix + key: tensor for key, tensor in state_dict.items()}, tmp_path / "m.safetensors")
    assert_same(functions.load(tmp_path / "m.safetensors"), model)


def test_log_says_what_was_detected_and_why(tmp_path, caplog):
    save_transformer(tiny.filled(SanaTransformer(TRANSFORMERS["sana-nano"])), tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO, logger="sana_core.checkpoint"):
        load_transformer(tmp_path / "m.safetensors")
    (line,) = caplog.messages
    assert "m.safetensors: sana-nano, by its own sana_config (official layout)" in line


def broken(tmp_path, kind, change):
    functions, model = build(kind, next(name for found, name in MODELS if found == kind))
    state_dict = model.state_dict()
    change(state_dict)
    save_file(state_dict, tmp_path / "broken.safetensors", metadata={CONFIG_KEY: json.dumps(vars(model.config))})
    with pytest.raises(CheckpointError) as error:
        functions.load(tmp_path / "broken.safetensors")
    return str(error.value)


def test_missing_weights_are_named(tmp_path):
    message = broken(tmp_path, "transformer", lambda state_dict: state_dict.pop("blocks.1.attn.qkv.weight"))
    assert "broken.safetensors" in message and "missing: blocks.1.attn.qkv.weight." in message


def test_extra_weights_are_named(tmp_path):
    extra = {f"decoder.extra.{number}": torch.zeros(1) for number in range(5)}
    message = broken(tmp_path, "dc_ae", lambda state_dict: state_dict.update(extra))
    assert "not expected: decoder.extra.0, decoder.extra.1, decoder.extra.2 and 2 more" in message
    assert "it looks like a DC-AE autoencoder" in message and "Download" in message


def test_misshapen_weights_are_named(tmp_path):
    message = broken(tmp_path, "transformer", lambda state_dict: state_dict.update({"t_block.1.bias": torch.zeros(7)}))
    assert "of another shape: t_block.1.bias [7] instead of [384]" in message


def test_controlnet_is_no_transformer(tmp_path):
    control = {"controlnet.0.before_proj.weight": torch.zeros(64, 64)}
    message = broken(tmp_path, "transformer", lambda state_dict: state_dict.update(control))
    assert "it looks like a Sana ControlNet" in message


@pytest.mark.parametrize("stored, asked", [(torch.float16, None), (torch.float32, torch.float16)])
def test_float16_autoencoder_becomes_float32_with_a_log_line(stored, asked, tmp_path, caplog):
    model = tiny.dc_ae().to(stored)
    save_dc_ae(model, tmp_path / "m.safetensors")
    with caplog.at_level(logging.INFO):
        loaded = load_dc_ae(tmp_path / "m.safetensors", dtype=asked)
    assert_same(loaded, model.float())
    assert "DC-AE overflows in torch.float16, so it is loaded in torch.float32" in caplog.text


def test_float8_transformer_is_refused_without_operations_that_know_it(tmp_path):
    model = tiny.transformer()
    state_dict = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in model.state_dict().items()}
    save_file(state_dict, tmp_path / "m.safetensors", metadata={CONFIG_KEY: json.dumps(vars(model.config))})
    with pytest.raises(CheckpointError, match="float8_e4m3fn.*dtype=torch.bfloat16"):
        load_transformer(tmp_path / "m.safetensors")
    assert load_transformer(tmp_path / "m.safetensors", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_transformer(tmp_path / "m.safetensors", operations=nn).dtype == torch.float8_e4m3fn


def test_layers_come_from_the_operations(tmp_path):
    class Linear(nn.Linear):
        pass

    operations = SimpleNamespace(Linear=Linear, Conv2d=nn.Conv2d, RMSNorm=nn.RMSNorm)
    save_transformer(tiny.transformer(), tmp_path / "m.safetensors")
    loaded = load_transformer(tmp_path / "m.safetensors", operations=operations, kernels=REFERENCE)
    assert isinstance(loaded.blocks[0].attn.qkv, Linear)
    assert_same(loaded, tiny.transformer())


def test_variant_names_an_autoencoder(tmp_path):
    model = tiny.filled(DCAE(AUTOENCODERS["dc-ae-nano"]))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert_same(load_dc_ae(tmp_path / "m.safetensors", variant="dc-ae-nano"), model)
    with pytest.raises(CheckpointError, match="the variant dc-ae-f32c32-mix-1.0 says"):
        load_dc_ae(tmp_path / "m.safetensors", variant="dc-ae-f32c32-mix-1.0")


@pytest.mark.parametrize("layout, name", [("official", "folder"), ("comfyui", "m.safetensors")])
def test_unknown_ways_to_save_are_refused(layout, name, tmp_path):
    with pytest.raises(CheckpointError, match="expected"):
        save_transformer(tiny.transformer(), tmp_path / name, layout=layout)
    assert not list(tmp_path.iterdir())


def test_saved_file_carries_its_configuration(tmp_path):
    save_transformer(tiny.transformer(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata[CONFIG_KEY]) == vars(tiny.TRANSFORMER) and metadata["format"] == "pt"
    assert CONFIG_KEY not in load_file(tmp_path / "m.safetensors")


def test_file_may_be_overwritten_by_the_model_loaded_from_it(tmp_path):
    save_transformer(tiny.transformer(), tmp_path / "m.safetensors")
    model = load_transformer(tmp_path / "m.safetensors")
    with torch.no_grad():
        model.t_block[1].bias.add_(1)
    save_transformer(model, tmp_path / "m.safetensors")
    assert_same(load_transformer(tmp_path / "m.safetensors"), model)


MEASURE_PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from sana_core.checkpoint import load_transformer
from sana_core.config import TRANSFORMERS
from sana_core.models.sana import SanaTransformer

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

SanaTransformer(TRANSFORMERS["sana-nano"], device="meta")  # torch imports much for its first meta tensors
done, peak, before = threading.Event(), 0, anonymous()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = load_transformer(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.set()
thread.join()
print(peak - before, sum(p.nbytes for p in model.parameters()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "layout, dtype", [("official", "float32"), ("diffusers", "float32"), ("diffusers", "bfloat16")]
)
def test_loading_holds_one_copy_of_the_weights(layout, dtype, tmp_path):
    model = tiny.transformer(hidden_size=512, depth=12)
    save_transformer(model, tmp_path / "m.safetensors", layout=layout)
    command = [sys.executable, "-c", MEASURE_PEAK, str(tmp_path / "m.safetensors"), dtype]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak, size = map(int, output.split())
    assert size > 80
    assert peak < 1.15 * size + 32, (peak, size)
