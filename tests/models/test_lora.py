"""LoRA files that diffusers and PEFT wrote give what they give there."""

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from peft import LoraConfig

from sana_core.checkpoint import read_lora, save_transformer
from sana_core.models.lora import LoraLayer, apply_lora
from tests import tiny

ATTENTION = ["to_q", "to_k", "to_v"]
EVERYWHERE = [*ATTENTION, "to_out.0", "conv_inverted", "conv_point", "patch_embed.proj", "proj_out", "linear_1"]
EVERYWHERE += ["linear_2", "time_embed.linear"]
TARGETS = {"attention": ATTENTION, "everywhere": EVERYWHERE}
MODELS = {"base": {}, "1.5": {"qk_norm": True}, "sprint": {"qk_norm": True, "guidance_embed": True}}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 32, 3, 4, generator=generator)
    context = torch.randn(2, 9, tiny.CHANNELS, generator=generator)
    return x, torch.tensor([0.9, 0.3]), context, torch.tensor([[1] * 9, [1] * 4 + [0] * 5])


def run(model, inputs):
    x, timestep, context, mask = inputs
    guidance = torch.tensor([4.5, 2.0]) if model.config.guidance_embed else None
    with torch.no_grad():
        return model(x, timestep, context, mask, guidance)


def run_diffusers(model, inputs):
    x, timestep, context, mask = inputs
    guidance = torch.tensor([0.45, 0.2]) if model.config.guidance_embeds else None
    with torch.no_grad():
        return model(x, context, timestep, guidance=guidance, encoder_attention_mask=mask).sample


def twin_of(model, folder):
    save_transformer(model, folder, layout="diffusers")
    twin = SanaTransformer2DModel.from_pretrained(folder).eval()
    for block in twin.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6  # the authors'
    return twin


def train(twin, folder, *, metadata, **settings):
    """A LoRA file that diffusers saves, of a network whose layers are as if trained; returns its path."""
    twin.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, **settings}))
    generator = torch.Generator().manual_seed(2)
    layers = {key: value for key, value in twin.named_parameters() if "lora_" in key}
    with torch.no_grad():
        for value in layers.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    tensors = {key.replace(".default", ""): value.detach() for key, value in layers.items()}
    config = twin.peft_config["default"].to_dict() if metadata else None
    SanaPipeline.save_lora_weights(folder, tensors, transformer_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


def largest(tensor):
    return tensor.abs().max().item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", TARGETS)
def test_output_agrees_with_diffusers(name, targets, inputs, tmp_path):
    model = tiny.transformer(**MODELS[name])
    twin = twin_of(model, tmp_path / "model")
    path = train(twin, tmp_path, metadata=False, target_modules=TARGETS[targets])
    other = twin_of(model, tmp_path / "model")
    other.load_lora_adapter(tmp_path, weight_name=path.name, prefix="transformer")
    before, expected = run(model, inputs), run_diffusers(other, inputs)
    assert largest(run_diffusers(twin, inputs) - expected) == 0, "diffusers must have read all of its own file"

    lora = read_lora(path, model.config)
    assert not lora.unmatched and len(lora.matched) == 2 * len(lora.layers)
    apply_lora(model, lora.layers)
    assert largest(before - expected) > 0.05 * largest(expected)
    assert largest(run(model, inputs) - expected) < 3e-6 * largest(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"alpha_pattern": {"attn2.to_q": 1, "ff.conv_point": 16}, "rank_pattern": {"attn1.to_k": 2}},
    ],
    ids=["alpha", "rank-stabilised", "patterns"],
)
def test_alpha_comes_from_the_metadata(settings, inputs, tmp_path):
    model = tiny.transformer()
    twin = twin_of(model, tmp_path / "model")
    path = train(twin, tmp_path, metadata=True, target_modules=[*ATTENTION, "conv_point"], **settings)
    apply_lora(model, read_lora(path, model.config).layers)
    expected = run_diffusers(twin, inputs)
    assert largest(run(model, inputs) - expected) < 3e-6 * largest(expected)


def test_a_folder_that_peft_saved(inputs, tmp_path):
    from peft import get_peft_model

    model = tiny.transformer()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights=False)
    wrapped = get_peft_model(twin_of(model, tmp_path / "model"), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    apply_lora(model, read_lora(tmp_path / "adapter", model.config).layers)
    expected = run_diffusers(wrapped, inputs)
    assert largest(run(model, inputs) - expected) < 3e-6 * largest(expected)


def test_rows_strength_and_scale():
    """By hand: only the rows named change, by strength * scale * up @ down."""
    model = tiny.transformer()
    before = model.blocks[1].attn.qkv.weight.clone()
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    apply_lora(model, [LoraLayer("blocks.1.attn.qkv.weight", (64, 64), down, up, 0.5)], -3.0)
    added = model.blocks[1].attn.qkv.weight - before
    torch.testing.assert_close(added[64:128], -1.5 * up @ down)
    assert largest(added[:64]) == largest(added[128:]) == 0


def test_narrow_weights_are_rounded_once():
    model = tiny.transformer().bfloat16()
    before = model.blocks[0].mlp.depth_conv.conv.weight.clone()
    layer = LoraLayer("blocks.0.mlp.depth_conv.conv.weight", None, torch.randn(2, 9), torch.randn(320, 2))
    apply_lora(model, [layer], 0.3)
    expected = (before.float() + 0.3 * (layer.up @ layer.down).view_as(before)).bfloat16()
    assert torch.equal(model.blocks[0].mlp.depth_conv.conv.weight, expected)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_the_strength_is_a_number(strength):
    with pytest.raises(ValueError, match="finite number"):
        apply_lora(tiny.transformer(), [], strength)
