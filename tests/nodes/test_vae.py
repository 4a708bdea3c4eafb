"""The VAE is the plain autoencoder behind ComfyUI's protocol."""

import pytest
import torch
from safetensors.torch import save_file

from sana_core.checkpoint import load_dc_ae
from tests import tiny


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "vae" / "tiny.safetensors"


@pytest.fixture
def vae(part, path):
    return part("nodes.vae").load_vae(path)


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


def test_has_every_attribute_of_a_core_vae(vae, comfy):
    ours = vars(vae).keys()
    assert vars(comfy.sd.VAE(sd={"pixel_space_vae": torch.zeros(1)})).keys() <= ours


def test_the_warning_of_the_empty_constructor_is_not_logged(part, path, caplog):
    part("nodes.vae").load_vae(path)
    assert "No VAE weights" not in caplog.text


def test_decodes_raw_latents(vae, path):
    latent = torch.randn(2, 32, 2, 3)
    expected = (load_dc_ae(path).decode(latent) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(vae.decode(latent), expected, atol=1e-6)


def test_encodes_to_raw_latents_and_crops_evenly(vae, path):
    pixels = torch.rand(1, 70, 100, 3)
    expected = load_dc_ae(path).encode(pixels[:, 3:67, 2:98].movedim(-1, 1) * 2 - 1)
    assert torch.allclose(vae.encode(pixels), expected, atol=1e-5)


def test_one_tile_is_the_whole_picture(vae):
    latent = torch.randn(1, 32, 3, 3)
    assert torch.allclose(vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2), vae.decode(latent), atol=1e-6)
    pixels = torch.rand(1, 96, 64, 3)
    tiled = vae.encode_tiled(pixels, tile_x=256, tile_y=256, overlap=64)
    assert torch.allclose(tiled, vae.encode(pixels), atol=1e-5)


def constant_decoder(latent):
    return latent[:, :3].repeat_interleave(32, 2).repeat_interleave(32, 3)


def test_tiles_join_without_seams(vae, monkeypatch):
    sizes = []

    def decode(latent):
        sizes.append(tuple(latent.shape[2:]))
        return constant_decoder(latent)

    monkeypatch.setattr(vae.first_stage_model, "decode", decode)
    latent = torch.rand(1, 32, 1, 1).expand(1, 32, 9, 7).clone()
    expected = (constant_decoder(latent) / 2 + 0.5).movedim(1, -1)
    assert torch.allclose(vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1), expected, atol=1e-5)
    assert len(sizes) > 1 and max(max(size) for size in sizes) == 4


@pytest.mark.parametrize("tile, overlap", [(100, 40), (64, 16), (32, 32)])
def test_encoding_tiles_stay_on_the_grid(vae, monkeypatch, tile, overlap):
    def encode(pixels):
        assert pixels.shape[2] % 32 == 0 and pixels.shape[3] % 32 == 0
        return torch.ones(1, 32, pixels.shape[2] // 32, pixels.shape[3] // 32)

    monkeypatch.setattr(vae.first_stage_model, "encode", encode)
    latent = vae.encode_tiled(torch.rand(1, 256, 320, 3), tile_x=tile, tile_y=tile, overlap=overlap)
    assert torch.allclose(latent, torch.ones(1, 32, 8, 10))


def test_runs_out_of_memory_into_tiles_of_1024(vae, comfy, monkeypatch):
    sizes = []

    def decode(latent):
        sizes.append(tuple(latent.shape[2:]))
        if latent.shape[3] > 32:
            raise torch.cuda.OutOfMemoryError("test")
        return constant_decoder(latent)

    monkeypatch.setattr(vae.first_stage_model, "decode", decode)
    assert vae.decode(torch.rand(1, 32, 2, 40)).shape == (1, 64, 1280, 3)
    assert sizes[0] == (2, 40) and set(sizes[1:]) == {(2, 32), (2, 12)}


@pytest.mark.parametrize("flag, expected", [("fp16_vae", torch.float32), ("bf16_vae", torch.bfloat16)])
def test_never_runs_in_float16(part, path, comfy, monkeypatch, caplog, flag, expected):
    from comfy.cli_args import args

    monkeypatch.setattr(args, flag, True)
    vae = part("nodes.vae").load_vae(path)
    assert vae.vae_dtype == expected == next(vae.first_stage_model.parameters()).dtype
    assert ("overflows" in caplog.text) == (flag == "fp16_vae")


def test_nan_is_named_by_its_stage(vae):
    with pytest.raises(ValueError, match="before the autoencoder"):
        vae.decode(torch.full((1, 32, 2, 2), float("nan")))
    vae.first_stage_model.decoder.project_in.main.conv.bias[0] = float("inf")
    with pytest.raises(ValueError, match="DC-AE decoder returned NaN"):
        vae.decode(torch.zeros(1, 32, 2, 2))
    vae.first_stage_model.encoder.project_out.main.op_list[0].conv.bias[0] = float("nan")
    with pytest.raises(ValueError, match="DC-AE encoder returned NaN"):
        vae.encode(torch.zeros(1, 64, 64, 3))


def test_foreign_latents_are_refused(vae):
    with pytest.raises(ValueError, match="4 channels.*takes 32"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_saved_weights_carry_the_configuration(part, vae, tmp_path):
    path = tmp_path / "saved.safetensors"
    save_file({key: tensor.clone() for key, tensor in vae.get_sd().items()}, path)
    assert vars(part("nodes.vae").load_vae(path).first_stage_model.config) == vars(tiny.DC_AE)


def test_core_can_make_a_fresh_copy(vae):
    copy = vae.patcher.clone(force_deepcopy=True)
    assert copy.model is not vae.first_stage_model and not vae.is_dynamic()
    assert torch.equal(copy.model.decoder.stages[1].op_list[0].main.conv.conv.weight.cpu(),
                       vae.first_stage_model.decoder.stages[1].op_list[0].main.conv.conv.weight.cpu())  # fmt: skip


def test_is_never_loaded_in_part(vae):
    assert vae.patcher.partially_load(torch.device("cpu"), extra_memory=1) > 0
    assert vae.patcher.model.model_lowvram is False
    assert vae.patcher.partially_unload(torch.device("cpu"), 10**9) == 0


def test_memory_grows_with_the_pixels(vae):
    one, four = (vae.memory_used_decode((1, 32, side, side), torch.float32) for side in (32, 64))
    assert four == 4 * one
    assert vae.memory_used_encode((1, 3, 1024, 1024), torch.bfloat16) == vae.memory_used_decode(
        (1, 32, 32, 32), torch.bfloat16
    )
