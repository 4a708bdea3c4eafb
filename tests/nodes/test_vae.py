"""The VAE is the plain autoencoder behind ComfyUI's protocol."""

import pytest
import torch
from safetensors.torch import save_file

from sana_core.checkpoint import load_dc_ae
from sana_core.models.memory import decode_memory, encode_memory
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


@pytest.mark.parametrize("decode", ["decode", "decode_tiled"])
def test_a_videos_first_frame_is_the_picture(vae, decode):
    video = torch.randn(2, 32, 3, 2, 3)
    assert torch.equal(getattr(vae, decode)(video), getattr(vae, decode)(video[:, :, 0]))


@pytest.fixture
def asked(part, monkeypatch):
    """Records (function, tile, pictures) of each tiled run."""
    module, calls = part("nodes.vae"), []

    def record(name, function):
        def recorded(model, x, tile, progress):
            calls.append((name, tile, len(x)))
            return function(model, x, tile, progress)

        monkeypatch.setattr(module, name, recorded)

    for name in ("decode_tiled", "encode_tiled"):
        record(name, getattr(module, name))
    return calls


def test_tiles_make_the_whole_picture(vae, asked):
    latent = torch.randn(2, 32, 5, 3)
    assert torch.allclose(vae.decode_tiled(latent, tile_x=2, tile_y=4, overlap=1), vae.decode(latent), atol=1e-5)
    assert asked == [("decode_tiled", 2, 1)] * 2
    pixels = torch.rand(1, 160, 100, 3)
    tiled = vae.encode_tiled(pixels, tile_x=70, tile_y=64, overlap=16)
    assert torch.allclose(tiled, vae.encode(pixels), atol=1e-5)
    assert asked[2:] == [("encode_tiled", 2, 1)]


def test_tiling_can_be_asked_for(vae, asked):
    latent = torch.randn(1, 32, 3, 2)
    always = vae.with_tiling("always", 64)
    assert torch.allclose(always.decode(latent), vae.decode(latent), atol=1e-5)
    pixels = torch.rand(1, 64, 96, 3)
    assert torch.allclose(always.encode(pixels), vae.encode(pixels), atol=1e-5)
    assert asked == [("decode_tiled", 2, 1), ("encode_tiled", 2, 1)]
    assert vae.tiling == "auto" and always.patcher is vae.patcher
    with pytest.raises(ValueError, match="tiling is 'some', expected one of auto, always, never"):
        vae.with_tiling("some")


@pytest.fixture
def little_memory(comfy, monkeypatch):
    """Lets ComfyUI see so many bytes."""

    def see(bytes_):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: bytes_)

    return see


def test_little_memory_calls_for_tiles_that_fit(vae, asked, little_memory):
    latent = torch.randn(1, 32, 2, 2)
    whole = vae.decode(latent)
    needed = vae.memory_used_decode((1, 32, 2, 2), torch.float32)
    little_memory(needed)
    vae.decode(latent)
    assert asked == []
    little_memory(needed - 1)
    assert torch.allclose(vae.decode(latent), whole, atol=1e-5)
    pixels = torch.rand(1, 64, 64, 3)
    little_memory(vae.memory_used_encode((1, 3, 64, 64), torch.float32) - 1)
    vae.encode(pixels)
    assert [name for name, _, _ in asked] == ["decode_tiled", "encode_tiled"] and asked[0][1] == 1


def test_never_means_never(vae, asked, little_memory, monkeypatch):
    little_memory(1)
    never = vae.with_tiling("never")
    assert never.decode(torch.randn(1, 32, 2, 2)).shape == (1, 64, 64, 3) and asked == []
    monkeypatch.setattr(vae.first_stage_model, "decode", out_of_memory)
    with pytest.raises(MemoryError, match="tiling is set to never. Set it to auto"):
        never.decode(torch.randn(1, 32, 2, 2))


def out_of_memory(_):
    raise torch.cuda.OutOfMemoryError("test")


def test_runs_out_of_memory_into_tiles(vae, asked, monkeypatch):
    latent, pixels = torch.randn(2, 32, 2, 3), torch.rand(1, 64, 96, 3)
    picture, encoded = vae.decode(latent), vae.encode(pixels)
    monkeypatch.setattr(vae.first_stage_model, "decode", out_of_memory)
    monkeypatch.setattr(vae.first_stage_model, "encode", out_of_memory)
    assert torch.allclose(vae.decode(latent), picture, atol=1e-5)
    assert torch.allclose(vae.encode(pixels), encoded, atol=1e-5)
    assert asked == [("decode_tiled", 32, 1)] * 2 + [("encode_tiled", 32, 1)]


def test_interrupts_are_heard_between_tiles(vae, comfy):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        vae.decode_tiled(torch.randn(1, 32, 2, 2), tile_x=1, tile_y=1)


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


def test_core_gets_the_estimate_for_one_picture(vae):
    config = vae.first_stage_model.config
    assert vae.memory_used_decode((4, 32, 32, 64), torch.bfloat16) == decode_memory(config, 1024, 2048, torch.bfloat16)
    assert vae.memory_used_encode((4, 3, 512, 256), torch.float32) == encode_memory(config, 512, 256, torch.float32)


@pytest.mark.parametrize("node", ["SanaDCAEDecode", "SanaDCAEEncode"])
def test_nodes_tile_as_asked(part, vae, asked, node):
    module = part("nodes.autoencoder")
    latent, pixels = torch.randn(1, 32, 3, 2), torch.rand(1, 96, 64, 3)
    if node == "SanaDCAEDecode":
        tiled, whole = (
            module.SanaDCAEDecode.execute({"samples": latent}, vae, 32, tiling)[0] for tiling in ("always", "never")
        )
    else:
        tiled, whole = (
            module.SanaDCAEEncode.execute(pixels, vae, 32, tiling)[0]["samples"] for tiling in ("always", "never")
        )
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert len(asked) == 1 and asked[0][1] == 1


def test_nodes_take_the_vaes_of_core(part):
    class Core:
        def decode(self, latent):
            return latent + 1

    result = part("nodes.autoencoder").SanaDCAEDecode.execute({"samples": torch.zeros(1)}, Core(), 512, "always")
    assert result[0] == 1
