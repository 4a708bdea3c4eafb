"""A trained LoRA's file in diffusers and in this project's reader, and its form for ComfyUI."""

import json

import pytest
import torch
from safetensors import safe_open

from sana_core.checkpoint import convert_lora, read_lora, save_transformer
from sana_core.models.lora import apply_lora
from sana_core.training.lora import TARGETS, AdaptedLayer, add_adapters, comfy_lora, save_lora
from tests import tiny

from .micro import run

ALL = list(TARGETS)


def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 32, 3, 5, generator=generator)
    context = torch.randn(2, 6, tiny.CHANNELS, generator=generator)
    return x, torch.tensor([900.0, 20.0]), context, torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool()


def trained(tmp_path, targets, rank=4, alpha=8.0):
    model = tiny.transformer()
    add_adapters(model, rank, alpha=alpha, targets=targets)
    return run(tmp_path / "run", model, steps=3, learning_rate=0.05)


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("targets", ALL)
@torch.no_grad()
def test_untrained_adapters_change_nothing(targets):
    model = tiny.transformer()
    add_adapters(model, 4, targets=targets)
    assert torch.equal(model(*inputs()), tiny.transformer()(*inputs()))


@pytest.mark.parametrize("targets", ALL)
def test_the_file_gives_the_trained_model_in_our_reader(tmp_path, targets):
    model, path = trained(tmp_path, targets), tmp_path / "lora.safetensors"
    save_lora(model, path, base_model="micro", step=3)
    plain = tiny.transformer()
    lora = read_lora(path, plain.config)
    assert lora.unmatched == () and len(lora.matched) == len(read_keys(path))
    with torch.no_grad():
        before = plain(*inputs())
        apply_lora(plain, lora.layers)
        assert difference(plain(*inputs()), model(*inputs())) < 1e-5
        assert difference(before, model(*inputs())) > 1e-2


def read_keys(path):
    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("targets", ALL)
def test_the_file_gives_the_trained_model_in_diffusers(tmp_path, targets):
    from diffusers import SanaPipeline, SanaTransformer2DModel

    model, path = trained(tmp_path, targets), tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(model, path, base_model="micro", step=3)
    save_transformer(tiny.transformer(), tmp_path / "transformer", layout="diffusers")
    other = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=other, scheduler=None)
    x, timestep, context, mask = inputs()

    def output():
        with torch.no_grad():
            return other(x, context, timestep, encoder_attention_mask=mask).sample

    before = output()
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    with torch.no_grad():
        expected = model(*inputs())
    assert difference(output(), expected) < 1e-5
    assert difference(before, expected) > 1e-2


@pytest.mark.parametrize("targets", ALL)
def test_comfyuis_form_adds_the_same(tmp_path, targets):
    model = trained(tmp_path, targets)
    tensors = comfy_lora(model)
    assert tensors["diffusion_model.blocks.0.attn.qkv.lora_down.weight"].shape == (12, 64)
    up = tensors["diffusion_model.blocks.1.attn.qkv.lora_up.weight"]
    assert up.shape == (192, 12)
    assert up[:64, 4:].abs().max() == 0 and up[64:128, 4:8].abs().max() > 0  # block-diagonal
    lora = convert_lora(tensors, tiny.TRANSFORMER, adapter_config={}, path="LORA_MODEL")
    assert lora.unmatched == ()
    assert len(lora.layers) == tiny.TRANSFORMER.depth * len(TARGETS[targets])
    save_lora(model, tmp_path / "split.safetensors", base_model="micro", step=3)
    split, merged = tiny.transformer(), tiny.transformer()
    apply_lora(split, read_lora(tmp_path / "split.safetensors", tiny.TRANSFORMER).layers)
    apply_lora(merged, lora.layers)
    for (name, one), other in zip(split.named_parameters(), merged.parameters(), strict=True):
        assert difference(one, other) < 1e-6, name


def test_the_file_says_what_it_is(tmp_path):
    model = tiny.transformer()
    add_adapters(model, 3, alpha=6)
    save_lora(model, tmp_path / "lora.safetensors", base_model="Sana_600M_512px", step=70)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert adapter["transformer.r"] == 3 and adapter["transformer.lora_alpha"] == 6
    assert "attn1.to_q" in adapter["transformer.target_modules"]
    assert (metadata["base_model"], metadata["rank"], metadata["step"]) == ("Sana_600M_512px", "3", "70")


@torch.no_grad()
def test_adapters_work_beside_bfloat16_weights_without_autocast():
    model = tiny.transformer().to(torch.bfloat16)
    add_adapters(model, 2)
    x, timestep, context, mask = inputs()
    out = model(x.to(torch.bfloat16), timestep, context.to(torch.bfloat16), mask)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_only_the_adapters_are_trained():
    model = tiny.transformer()
    add_adapters(model, 2, targets="attention+feed-forward")
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all(".down." in name or ".up." in name for name in names)
    assert len(names) == tiny.TRANSFORMER.depth * 2 * (3 + 1 + 1 + 2 + 1 + 2)
    assert not any("depth_conv" in name for name in names)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "alpha": -1}, "alpha above 0"),
        ({"rank": 2, "targets": "everything"}, "'everything' are unknown, expected one of attention, "),
    ],
)
def test_impossible_adapters_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny.transformer(), **wrong)


def test_adapters_are_needed_once(tmp_path):
    model = tiny.transformer()
    with pytest.raises(ValueError, match="no LoRA adapters"):
        save_lora(model, tmp_path / "lora.safetensors", base_model="micro", step=0)
    add_adapters(model, 2)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_adapters(model, 2)


def test_parts_of_a_fused_layer_are_adapted_as_if_each_stood_alone():
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 12)
    layer = AdaptedLayer(base, 3, 2, 0.5, torch.Generator().manual_seed(0))
    for up in layer.up:
        torch.nn.init.normal_(up)
    x = torch.randn(2, 5, 8)
    parts = [x @ down.T @ up.T for down, up in zip(layer.down, layer.up, strict=True)]
    expected = base(x) + 0.5 * torch.cat(parts, -1)
    torch.testing.assert_close(layer(x), expected)
    weights = [*layer.down, *layer.up]
    direction = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(layer(x), weights, direction),
        torch.autograd.grad(expected, weights, direction),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
