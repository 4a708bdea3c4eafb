"""The pipeline's parts from files: models, a diffusers folder, LoRAs."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from sana_core import SanaPipeline, pipeline
from sana_core.checkpoint import save_dc_ae, save_text_encoder, save_transformer
from tests import loras, tiny

PROMPT = "two green birds sleep under a warm yellow sun, 红色背景左边的熊猫 🐼"
QUICK = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"{name}.safetensors" for name in ("transformer", "vae", "text_encoder")}
    save_transformer(pipe.transformer, paths["transformer"])
    save_dc_ae(pipe.vae, paths["vae"])
    save_text_encoder(pipe.text_encoder, paths["text_encoder"])
    return paths


def test_files_give_the_same_pictures(pipe, files):
    loaded = SanaPipeline.from_files(**files, device="cpu")
    assert torch.equal(loaded(PROMPT, seed=1, **QUICK), pipe(PROMPT, seed=1, **QUICK))


def test_float16_is_for_the_transformer_alone(files):
    loaded = SanaPipeline.from_files(**files, device="cpu", dtype=torch.float16)
    assert loaded.transformer.dtype == torch.float16
    assert {loaded.vae.dtype, loaded.text_encoder.dtype} <= {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("trained, asked", [("float16", None), ("bfloat16", None), ("bfloat16", torch.float32)])
def test_a_gpu_gets_what_the_transformer_was_trained_in(files, tmp_path, trained, asked, monkeypatch):
    """Official files are float32 throughout. The meta device, which transformers does not know, stands for a GPU."""
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda *_, **__: tiny.text_encoder())
    path = tmp_path / "wide.safetensors"
    save_transformer(tiny.transformer(dtype=trained), path)
    loaded = SanaPipeline.from_files(**files | {"transformer": path}, device="meta", dtype=asked)
    assert loaded.device.type == "meta" and loaded.transformer.dtype == (asked or getattr(torch, trained))
    assert loaded.vae.dtype == torch.float32, "as its file"


def test_missing_files_are_all_named(files, tmp_path):
    absent = {"vae": tmp_path / "no_vae.safetensors", "text_encoder": tmp_path / "no_gemma"}
    with pytest.raises(FileNotFoundError, match="vae .*no_vae.safetensors, text_encoder .*no_gemma"):
        SanaPipeline.from_files(**{**files, **absent})


@pytest.mark.parametrize("scheduler, shift", [({"flow_shift": 4.0}, 4.0), ({"shift": 5.0}, 5.0), (None, 3.0)])
def test_a_diffusers_folder_brings_its_shift(pipe, tmp_path, scheduler, shift):
    save_transformer(pipe.transformer, tmp_path / "transformer", layout="diffusers")
    save_dc_ae(pipe.vae, tmp_path / "vae", layout="diffusers")
    save_text_encoder(pipe.text_encoder, tmp_path / "text_encoder" / "model.safetensors")
    if scheduler is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    loaded = SanaPipeline.from_pretrained(tmp_path, device="cpu")
    assert loaded.shift == shift
    assert torch.equal(loaded(PROMPT, seed=1, **QUICK, shift=3.0), pipe(PROMPT, seed=1, **QUICK))


def test_what_is_no_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="someone/anything is not a folder.*diffusers layout"):
        SanaPipeline.from_pretrained("someone/anything")


def test_loras_add_up_in_the_pipeline(tmp_path, caplog):
    pipe = SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())
    layers = loras.factors(pipe.transformer, ["blocks.1.attn.qkv"])
    save_file(loras.flat(layers), tmp_path / "a.safetensors")
    save_file(loras.flat(layers) | {"lora_te_x.alpha": torch.ones(1)}, tmp_path / "b.safetensors")
    plain = pipe(PROMPT, seed=5, **QUICK)
    with caplog.at_level(logging.INFO):
        pipe.load_lora(tmp_path / "a.safetensors", 0.25)
        lora = pipe.load_lora(tmp_path / "b.safetensors", 0.5)
    assert lora.unmatched == ("lora_te_x.alpha",)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "2 of 3 keys matched, 1 weights changed; not in this model: lora_te_x.alpha" in caplog.text
    ((down, up),) = layers.values()
    expected = tiny.transformer().blocks[1].attn.qkv.weight + 0.75 * up @ down
    torch.testing.assert_close(pipe.transformer.blocks[1].attn.qkv.weight, expected)
    assert not torch.allclose(pipe(PROMPT, seed=5, **QUICK), plain, atol=1e-3)
