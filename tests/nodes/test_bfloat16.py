"""What the loaders take on a CPU that multiplies bfloat16, and on one that does not."""

import pytest
import torch

from tests import tiny


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, part, monkeypatch):
    """The answer of the probe; every network counts as large."""
    processor = part("sana_core.processor")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)
    monkeypatch.setattr(processor, "LEAST_WEIGHTS", 0)
    processor.multiplies_bfloat16.cache_clear()
    yield request.param
    processor.multiplies_bfloat16.cache_clear()


def narrow(native):
    return torch.bfloat16 if native else torch.float32


@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_transformer(part, tiny_models, native, asked):
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors", dtype=asked).model
    assert model.diffusion_model.dtype == (asked or narrow(native))
    assert model.get_dtype_inference() == (torch.float32 if asked == torch.float32 else narrow(native))
    x, context = torch.randn(1, 32, 2, 3), torch.randn(1, 5, tiny.CHANNELS)
    out = model.apply_model(x, torch.tensor([0.5]), c_crossattn=context)
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_autoencoder_and_text_encoder(part, tiny_models, native):
    assert part("nodes.vae").load_vae(tiny_models / "vae" / "tiny.safetensors").vae_dtype == narrow(native)
    clip = part("nodes.clip").load_clip(tiny_models / "text_encoders" / "tiny.safetensors")
    assert clip.cond_stage_model.encoder.dtype == narrow(native)


@pytest.mark.parametrize("option", ["fp32_unet", "force_fp32"])
def test_float32_that_comfyui_was_started_with(part, tiny_models, native, monkeypatch, option):
    from comfy.cli_args import args

    monkeypatch.setattr(args, option, True)
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors").model
    assert model.diffusion_model.dtype == torch.float32


def test_small_networks_stay_in_float32(part, tiny_models, native, monkeypatch):
    monkeypatch.setattr(part("sana_core.processor"), "LEAST_WEIGHTS", 10**8)
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors").model
    assert model.diffusion_model.dtype == torch.float32
