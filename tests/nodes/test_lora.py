"""The node's patches are what merging gives, and ComfyUI may strengthen, chain and undo them."""

import pytest
import torch
from safetensors.torch import save_file

from sana_core.checkpoint import load_transformer, read_lora
from sana_core.models.lora import apply_lora
from tests import loras, tiny

MODULES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_out.0")
CPU = torch.device("cpu")


@pytest.fixture
def folder(part, tmp_path, monkeypatch):
    """A models/loras of its own."""
    import folder_paths

    extensions = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def path(tiny_models):
    return tiny_models / "diffusion_models" / "tiny.safetensors"


@pytest.fixture
def patcher(part, path):
    return part("nodes.adapter").load_model(path)


@pytest.fixture
def node(part):
    return part("nodes.lora").SanaLoraLoader


def split_file(folder, name="split.safetensors", seed=5):
    """A LoRA under diffusers' names: parts of fused weights, convolutions, alpha."""
    layers = {}
    for block in (0, 1):
        for module in MODULES:
            generator = torch.Generator().manual_seed(seed + len(layers))
            down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((3, 64), (64, 3)))
            layers[f"transformer_blocks.{block}.{module}"] = (down, up)
    for ours, theirs in (("inverted", "conv_inverted"), ("depth", "conv_depth"), ("point", "conv_point")):
        (factors,) = loras.factors(tiny.transformer(), [f"blocks.1.mlp.{ours}_conv.conv"]).values()
        layers[f"transformer_blocks.1.ff.{theirs}"] = factors
    tensors = loras.flat(layers, alpha=1.5) | {"lora_unet_proj_out.diff_b": torch.ones(32)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return name


def weights_of(patcher):
    """The weights that ComfyUI samples with."""
    patcher.patch_model(device_to=CPU)
    weights = {key: tensor.clone() for key, tensor in patcher.model.diffusion_model.state_dict().items()}
    patcher.unpatch_model()
    return weights


def merged(path, *files):
    model = load_transformer(path)
    for file, strength in files:
        apply_lora(model, read_lora(file, model.config).layers, strength)
    return model.state_dict()


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[key].float() - other[key].float()).abs().max().item() for key in one)


@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_patches_are_the_merged_weights(node, patcher, path, folder, strength):
    name = split_file(folder)
    (patched,) = node.execute(patcher, name, strength).result
    expected = merged(path, (folder / name, strength))
    assert largest_difference(weights_of(patched), expected) < 1e-6
    assert largest_difference(weights_of(patcher), expected) > 0.1, "the MODEL that came in must stay as it was"


def test_chained_loras_add_up_and_come_off_again(node, patcher, path, folder):
    before = weights_of(patcher)
    names = [split_file(folder, f"{seed}.safetensors", seed) for seed in (5, 50)]
    (one,) = node.execute(patcher, names[0], 0.5).result
    (both,) = node.execute(one, names[1], 2.0).result
    expected = merged(path, (folder / names[0], 0.5), (folder / names[1], 2.0))
    assert largest_difference(weights_of(both), expected) < 2e-6
    assert largest_difference(weights_of(one), merged(path, (folder / names[0], 0.5))) < 1e-6
    assert largest_difference(weights_of(patcher), before) == 0


def test_float8_weights(node, part, path, folder):
    """The patch is added to the weights as float8 rounded them, and the sum rounded again: half of 1/8 at most."""
    name = split_file(folder)
    patcher = part("nodes.adapter").load_model(path, dtype=torch.float8_e4m3fn)
    (patched,) = node.execute(patcher, name, 1.0).result
    model = load_transformer(path)
    model.load_state_dict({key: value.float() for key, value in weights_of(patcher).items()})
    apply_lora(model, read_lora(folder / name, model.config).layers)
    actual = weights_of(patched)
    assert actual["blocks.0.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    for key, expected in model.state_dict().items():
        error = (actual[key].float() - expected).abs()
        assert (error <= expected.abs() / 8 + 2**-9).all(), key  # core rounds at random to either neighbour


def test_says_how_much_matched(node, patcher, folder):
    name = split_file(folder)
    output = node.execute(patcher, name)
    (text,) = output.ui.as_dict()["text"]
    assert text == "split.safetensors: 40 of 40 keys matched, 14 weights changed"


def test_cores_loader_agrees_on_official_names(node, patcher, comfy, folder):
    import nodes

    layers = loras.factors(tiny.transformer(), ["blocks.0.attn.qkv", "blocks.1.cross_attn.kv_linear"])
    save_file(loras.flat(layers, alpha=1.5), folder / "fused.safetensors")
    (ours,) = node.execute(patcher, "fused.safetensors", 0.7).result
    (cores,) = nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, "fused.safetensors", 0.7)
    assert largest_difference(weights_of(ours), weights_of(cores)) == 0
    assert largest_difference(weights_of(ours), weights_of(patcher)) > 0.1


def test_another_model_or_file_is_refused(node, patcher, folder):
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(2, 2)}, folder / "flux.safetensors")
    with pytest.raises(ValueError, match="looks like a LoRA for Flux"):
        node.execute(patcher, "flux.safetensors")
    with pytest.raises(FileNotFoundError):
        node.execute(patcher, "missing.safetensors")
    other = patcher.clone()
    other.model = torch.nn.Module()
    other.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a Module, no Sana"):
        node.execute(other, "flux.safetensors")
