"""Number formats of the MODEL: what core chooses, what a file has, what a user picks."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_core.checkpoint import dump_config, load_transformer, save_transformer
from sana_core.config import TRANSFORMERS
from tests import quantized, tiny

FLOAT8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LINEAR = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.cross_attn.kv_linear", "t_block.1")


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "diffusion_models" / "tiny.safetensors"


@pytest.fixture
def load_model(part):
    return part("nodes.adapter").load_model


@pytest.fixture
def inputs():
    return tiny.inputs([999.7, 321.5], tokens=9)


def run_plain(state_dict, inputs):
    model = tiny.transformer()
    model.load_state_dict({key: tensor.float() for key, tensor in state_dict.items()})
    return model(*inputs.values())


def error(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.fixture
def gpu(comfy, monkeypatch):
    """Core's own choice as on a GPU that is fast in some types; a CPU is in none."""

    def fast_in(*dtypes, memory=80 << 30):
        management = comfy.model_management
        monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: torch.float16 in dtypes)
        monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: torch.bfloat16 in dtypes)
        monkeypatch.setattr(management, "supports_fp8_compute", lambda *_: torch.float8_e4m3fn in dtypes)
        monkeypatch.setattr(management, "maximum_vram_for_weights", lambda *_: memory)

    return fast_in


def preset_file(tmp_path, name, dtype=torch.float32):
    """A tiny file that says of itself that it is of a published model's training dtype."""
    path = tmp_path / f"{name}.safetensors"
    save_transformer(tiny.transformer(dtype=TRANSFORMERS[name].dtype).to(dtype), path)
    return path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, trained",
    [
        ("Sana_600M_512px", torch.float16),
        ("Sana_600M_1024px", torch.float16),
        ("Sana_1600M_512px", torch.float16),
        ("Sana_1600M_1024px_MultiLing", torch.float16),
        ("Sana_1600M_1024px_BF16", torch.bfloat16),
        ("Sana_1600M_2Kpx_BF16", torch.bfloat16),
        ("Sana_1600M_4Kpx_BF16", torch.bfloat16),
        ("SANA1.5_1.6B_1024px", torch.bfloat16),
        ("SANA1.5_4.8B_1024px", torch.bfloat16),
        ("Sana_Sprint_0.6B_1024px", torch.bfloat16),
        ("sana-nano", torch.bfloat16),
    ],
)
def test_auto_is_what_the_model_was_trained_in(load_model, tmp_path, gpu, name, trained, stored):
    """NVlabs/Sana docs/model_zoo.md, whatever the file is stored in: all official ones are float32."""
    gpu(torch.float16, torch.bfloat16)
    model = load_model(preset_file(tmp_path, name, stored)).model
    assert model.diffusion_model.dtype == trained and model.manual_cast_dtype is None


def test_auto_leaves_a_type_that_the_gpu_lacks(load_model, tmp_path, gpu):
    gpu(torch.float16)
    assert load_model(preset_file(tmp_path, "Sana_1600M_1024px_BF16")).model.diffusion_model.dtype == torch.float32
    assert load_model(preset_file(tmp_path, "Sana_1600M_1024px")).model.diffusion_model.dtype == torch.float16
    gpu(torch.bfloat16)
    assert load_model(preset_file(tmp_path, "Sana_1600M_1024px")).model.diffusion_model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Sana_1600M_1024px", "Sana_1600M_1024px_BF16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_float32_on_a_cpu(load_model, tmp_path, name, stored):
    model = load_model(preset_file(tmp_path, name, stored)).model
    assert model.diffusion_model.dtype == torch.float32 and model.manual_cast_dtype is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *FLOAT8.values()])
def test_what_the_user_picks_is_what_the_weights_are(load_model, part, path, inputs, dtype, monkeypatch):
    monkeypatch.setattr(part("nodes.bfloat16"), "multiplies_bfloat16", lambda: False)  # else bfloat16 is computed in
    model = load_model(path, dtype=dtype).model
    weights = dict(model.diffusion_model.named_parameters())
    assert weights["blocks.0.attn.qkv.weight"].dtype == weights["blocks.0.mlp.depth_conv.conv.weight"].dtype == dtype
    narrow = dtype in FLOAT8.values()
    for name in ("attention_y_norm.weight", "blocks.0.scale_shift_table", "final_layer.scale_shift_table"):
        assert weights[name].dtype == (torch.bfloat16 if narrow else dtype), "norms and tables need more digits"
    out = model.diffusion_model(**inputs)
    rounded = {key: tensor.to(weights[key].dtype) for key, tensor in tiny.transformer().state_dict().items()}
    assert out.dtype == torch.float32 and error(out, run_plain(rounded, inputs)) < 1e-5


def test_float16_for_a_model_that_overflows_in_it_is_said(load_model, tmp_path, caplog):
    load_model(preset_file(tmp_path, "Sana_1600M_1024px"), dtype=torch.float16)
    assert "may overflow" not in caplog.text
    load_model(preset_file(tmp_path, "Sana_1600M_1024px_BF16"), dtype=torch.float16)
    assert "trained in bfloat16 and may overflow in float16" in caplog.text


def test_the_loader_offers_them(part, load_model):
    (dtype,) = (
        entry for entry in part("nodes.loaders").SanaDiffusionModelLoader.define_schema().inputs if entry.id == "dtype"
    )
    assert dtype.options == ["auto", "bfloat16", "float16", "float32", *FLOAT8]
    assert {name: part("nodes.loaders")._DTYPES[name] for name in FLOAT8} == FLOAT8


@pytest.fixture(params=FLOAT8.values(), ids=FLOAT8)
def float8_file(request, tmp_path):
    """All weights cast to 8 bits, without scales, norms and tables included."""
    path = tmp_path / "fp8.safetensors"
    state_dict = {key: tensor.to(request.param) for key, tensor in tiny.transformer().state_dict().items()}
    save_file(state_dict, path, metadata={"sana_config": dump_config(tiny.TRANSFORMER)})
    return path, request.param, state_dict


def test_a_file_in_float8_runs_as_it_was_rounded(load_model, float8_file, inputs):
    path, _, state_dict = float8_file
    model = load_model(path).model
    assert model.diffusion_model.dtype == torch.float32, "a CPU has memory enough"
    assert error(model.diffusion_model(**inputs), run_plain(state_dict, inputs)) < 1e-5


def test_a_file_in_float8_stays_so_where_memory_is_short(load_model, float8_file, inputs, gpu):
    path, dtype, state_dict = float8_file
    gpu(memory=0)
    model = load_model(path).model
    assert model.diffusion_model.dtype == dtype
    assert error(model.diffusion_model(**inputs), run_plain(state_dict, inputs)) < 1e-5


@pytest.mark.parametrize("dtype", FLOAT8.values(), ids=FLOAT8)
@pytest.mark.parametrize("spelling", quantized.SPELLINGS)
def test_scaled_layers_run_in_cores_operations(load_model, tmp_path, inputs, spelling, dtype):
    path = tmp_path / "scaled.safetensors"
    expected = quantized.save_quantized(tiny.transformer(), path, LINEAR, spelling, dtype)
    network = load_model(path).model.diffusion_model
    for layer in LINEAR:
        assert network.get_submodule(layer).weight._qdata.dtype == dtype
    assert error(network(**inputs), run_plain(expected, inputs)) < 1e-5


@pytest.mark.parametrize("spelling", quantized.SPELLINGS)
def test_a_scaled_convolution_is_multiplied_out(load_model, tmp_path, inputs, spelling):
    path = tmp_path / "scaled.safetensors"
    layers = [*LINEAR, "blocks.0.mlp.inverted_conv.conv"]
    expected = quantized.save_quantized(tiny.transformer(), path, layers, spelling)
    assert error(load_model(path).model.diffusion_model(**inputs), run_plain(expected, inputs)) < 5e-3  # bfloat16


@pytest.mark.parametrize("picked", [*FLOAT8.values(), torch.bfloat16])
def test_a_scaled_file_keeps_its_scales_whatever_is_picked(load_model, tmp_path, inputs, picked):
    path = tmp_path / "scaled.safetensors"
    expected = quantized.save_quantized(tiny.transformer(), path, LINEAR)
    network = load_model(path, dtype=picked).model.diffusion_model
    assert network.dtype == (torch.bfloat16 if picked == torch.bfloat16 else torch.float32)
    assert error(network(**inputs), run_plain(expected, inputs)) < 5e-3


def test_a_scaled_model_can_be_saved_copied_and_loaded_again(load_model, tmp_path, inputs):
    path, saved = tmp_path / "scaled.safetensors", tmp_path / "saved.safetensors"
    quantized.save_quantized(tiny.transformer(), path, LINEAR)
    patcher = load_model(path)
    out = patcher.model.diffusion_model(**inputs)
    save_file({key: tensor.clone() for key, tensor in patcher.state_dict_for_saving().items()}, saved)
    assert load_file(saved)["model.diffusion_model.blocks.0.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(load_model(saved).model.diffusion_model(**inputs), out)
    assert torch.equal(patcher.clone(force_deepcopy=True).model.diffusion_model(**inputs), out)


def test_a_scaled_layer_takes_a_patch(load_model, tmp_path, inputs):
    """A LoRA's difference is added to what the layer stands for, and the sum is scaled and rounded anew."""
    path = tmp_path / "scaled.safetensors"
    expected = quantized.save_quantized(tiny.transformer(), path, LINEAR)
    patcher = load_model(path)
    key = "blocks.0.attn.qkv.weight"
    expected[key] = expected[key] + 0.3 * torch.randn_like(expected[key])
    before = patcher.model.diffusion_model(**inputs)
    delta = expected[key] - patcher.model.diffusion_model.blocks[0].attn.qkv.weight.dequantize()
    patched = patcher.clone()
    assert patched.add_patches({f"diffusion_model.{key}": ("diff", (delta,))}) == [f"diffusion_model.{key}"]
    patched.patch_model(device_to=torch.device("cpu"))
    after = patched.model.diffusion_model(**inputs)
    patched.unpatch_model()
    assert error(after, run_plain(expected, inputs)) < 0.03 < 0.1 < error(after, before)
    assert torch.equal(patcher.model.diffusion_model(**inputs), before)


def test_outside_of_comfyui_scaled_weights_are_multiplied_out(tmp_path, inputs):
    path = tmp_path / "scaled.safetensors"
    expected = quantized.save_quantized(tiny.transformer(), path, LINEAR)
    assert error(load_transformer(path, dtype=torch.float32)(*inputs.values()), run_plain(expected, inputs)) < 5e-3
