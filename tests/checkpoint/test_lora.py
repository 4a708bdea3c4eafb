"""Every spelling of LoRA keys gives the same weights, and what is no LoRA for the model is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sana_core.checkpoint import CheckpointError, read_lora
from sana_core.checkpoint.keys import diffusers_names, transformer_rules
from sana_core.config import TRANSFORMERS
from sana_core.models.lora import apply_lora
from sana_core.models.sana import SanaTransformer
from tests import loras, tiny

SPLIT = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v")
SPLIT += ("attn2.to_out.0", "ff.conv_inverted", "ff.conv_depth", "ff.conv_point")
OLD = {"down": "lora.down.weight", "up": "lora.up.weight"}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
NAMED = {"down": "lora_A.style.weight", "up": "lora_B.style.weight"}
BARE = {"down": "lora_A", "up": "lora_B"}
SPELLINGS = {
    "diffusers": lambda layers: loras.dotted(layers, "transformer."),
    "diffusers, before PEFT": lambda layers: loras.dotted(layers, "transformer.", **OLD),
    "PEFT": lambda layers: loras.dotted(layers, "base_model.model."),
    "PEFT, with the adapter's name": lambda layers: loras.dotted(layers, "base_model.model.", **NAMED),
    "PEFT, without weight": lambda layers: loras.dotted(layers, "transformer.", **BARE),
    "OneTrainer, original": lambda layers: loras.dotted(layers, alpha=loras.RANK),
    "OneTrainer, comfy": lambda layers: loras.dotted(layers, "diffusion_model.", alpha=loras.RANK),
    "OneTrainer, kohya": lambda layers: loras.flat(layers, alpha=loras.RANK),
    "OneTrainer, internal": lambda layers: loras.dotted(layers, "transformer.", **KOHYA, alpha=loras.RANK),
    "OneTrainer, before 2026": lambda layers: loras.dotted(layers, "lora_transformer.", **KOHYA, alpha=loras.RANK),
    "LyCORIS": lambda layers: loras.flat(layers, "lycoris_", alpha=loras.RANK),
    "kohya of transformers": lambda layers: loras.flat(layers, "lora_transformer_", alpha=loras.RANK),
}
FUSED_SPELLINGS = {
    "ComfyUI": lambda layers: loras.dotted(layers, "diffusion_model.", **KOHYA),
    "ComfyUI, with the checkpoint's prefix": lambda layers: loras.dotted(layers, "model.diffusion_model."),
    "kohya": lambda layers: loras.flat(layers),
    "PEFT": lambda layers: loras.dotted(layers, "base_model.model."),
    "bare": lambda layers: loras.dotted(layers),
}


@pytest.fixture
def model():
    return tiny.transformer()


@pytest.fixture
def layers(model):
    """Random layers of both blocks, under diffusers' names."""
    rules = transformer_rules({})
    out = {}
    for official, parts in (
        ("attn.qkv", 3), ("attn.proj", 1), ("cross_attn.q_linear", 1), ("cross_attn.kv_linear", 2),
        ("cross_attn.proj", 1), ("mlp.inverted_conv.conv", 1), ("mlp.depth_conv.conv", 1), ("mlp.point_conv.conv", 1),
    ):  # fmt: skip
        for block in (0, 1):
            module = f"blocks.{block}.{official}"
            ((down, up),) = loras.factors(model, [module], seed=block).values()
            names = diffusers_names(f"{module}.weight", rules)
            for index, (name, rows) in enumerate(zip(names, up.chunk(parts), strict=True)):
                out[name.removesuffix(".weight")] = (down.roll(index, 0) * (index + 1), rows)
    return out


def written(tmp_path, tensors, metadata=None):
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def read(tmp_path, tensors, config=tiny.TRANSFORMER, metadata=None):
    return read_lora(written(tmp_path, tensors, metadata), config)


def merged(tmp_path, tensors, strength=1.0, metadata=None):
    """All weights of the tiny model after the file was applied; every key of it must have matched."""
    lora = read(tmp_path, tensors, metadata=metadata)
    assert not lora.unmatched and set(lora.matched) == tensors.keys()
    model = tiny.transformer()
    apply_lora(model, lora.layers, strength)
    return model.state_dict()


def by_hand(model, layers, scale=1.0):
    """The weights, where each part of a fused one is found by its place in the list of its parts."""
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rows = {"attn1.to_q": 0, "attn1.to_k": 64, "attn1.to_v": 128, "attn2.to_k": 0, "attn2.to_v": 64}
    names = {
        "attn1.to_q": "attn.qkv", "attn1.to_k": "attn.qkv", "attn1.to_v": "attn.qkv", "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear", "attn2.to_k": "cross_attn.kv_linear", "attn2.to_v": "cross_attn.kv_linear",
        "attn2.to_out.0": "cross_attn.proj", "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv", "ff.conv_point": "mlp.point_conv.conv",
    }  # fmt: skip
    for module, (down, up) in layers.items():
        _, block, name = module.split(".", 2)
        weight = weights[f"blocks.{block}.{names[name]}.weight"]
        first = rows.get(name, 0)
        part = weight[first : first + len(up)]
        part += scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view_as(part)
    return weights


def assert_same(actual, expected, tolerance=2e-6):
    assert actual.keys() == expected.keys()
    worst = max((actual[key] - expected[key]).abs().max().item() for key in expected)
    assert worst < tolerance, f"{worst:.1e}"


def test_the_layers_are_all_of_the_block(layers):
    assert {name.split(".", 2)[2] for name in layers} == set(SPLIT)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_diffusers_names(spelling, model, layers, tmp_path):
    expected = by_hand(model, layers)
    assert (expected["blocks.1.attn.qkv.weight"] - model.blocks[1].attn.qkv.weight).abs().max() > 0.1
    assert_same(merged(tmp_path, SPELLINGS[spelling](layers)), expected)


@pytest.mark.parametrize("spelling", FUSED_SPELLINGS)
def test_spellings_of_official_names(spelling, model, layers, tmp_path):
    tensors = FUSED_SPELLINGS[spelling](loras.fused(layers))
    assert not any("to_q" in key for key in tensors)
    assert_same(merged(tmp_path, tensors), by_hand(model, layers))


@pytest.mark.parametrize("spelling", ["OneTrainer, comfy", "OneTrainer, kohya"])
def test_alpha_and_strength_scale(spelling, model, layers, tmp_path):
    tensors = SPELLINGS[spelling](layers)
    tensors = {key: torch.tensor(1.5) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    assert_same(merged(tmp_path, tensors, -0.5), by_hand(model, layers, -0.25))


def test_a_tensor_wins_over_metadata(model, layers, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 30})}
    tensors = loras.dotted(layers, "transformer.")
    assert_same(merged(tmp_path, tensors, metadata=metadata), by_hand(model, layers, 10), 3e-5)
    tensors = loras.dotted(layers, "transformer.", alpha=6)
    assert_same(merged(tmp_path, tensors, metadata=metadata), by_hand(model, layers, 2), 6e-6)


def test_differences_of_norms_biases_and_tables(tmp_path):
    """What ComfyUI's training node writes besides low-rank layers; by hand."""
    tensors = {
        "diffusion_model.attention_y_norm.diff": torch.randn(64),
        "diffusion_model.blocks.1.cross_attn.kv_linear.diff_b": torch.randn(128),
        "diffusion_model.blocks.0.scale_shift_table.diff": torch.randn(6, 64),
        "lora_unet_final_layer_linear.diff": torch.randn(32, 64),
        "transformer.transformer_blocks.0.attn2.to_v.diff_b": torch.randn(64),
    }
    before, after = tiny.transformer().state_dict(), merged(tmp_path, tensors, 0.5)
    expected = {key: tensor.clone() for key, tensor in before.items()}
    norm, bias, table, linear, rows = tensors.values()
    expected["attention_y_norm.weight"] += 0.5 * norm
    expected["blocks.1.cross_attn.kv_linear.bias"] += 0.5 * bias
    expected["blocks.0.scale_shift_table"] += 0.5 * table
    expected["final_layer.linear.weight"] += 0.5 * linear
    expected["blocks.0.cross_attn.kv_linear.bias"][64:] += 0.5 * rows
    assert_same(after, expected)


@pytest.mark.parametrize("name", ["Sana_600M_1024px", "Sana_1600M_1024px_BF16", "Sana_Sprint_1.6B_1024px"])
def test_dreambooth_files_of_published_sizes_match_whole(name, tmp_path):
    """Keys and shapes of diffusers' DreamBooth script with its default targets, at rank 2."""
    config = TRANSFORMERS[name]
    modules = [f"transformer_blocks.{block}.{part}" for block in range(config.depth) for part in SPLIT if "to_" in part]
    modules = [module for module in modules if "to_out" not in module]
    size = config.hidden_size
    layers = {module: (torch.zeros(2, size), torch.zeros(size, 2)) for module in modules}
    lora = read(tmp_path, loras.dotted(layers, "transformer."), config)
    assert (len(lora.matched), len(lora.layers)) == (12 * config.depth, 6 * config.depth)
    assert not lora.unmatched
    assert {layer.rows for layer in lora.layers} == {(0, size), (size, size), (2 * size, size), None}


@pytest.mark.parametrize("name", ["Sana_600M_1024px", "SANA1.5_1.6B_1024px", "Sana_Sprint_0.6B_1024px"])
def test_every_parameter_has_one_place_under_each_name(name, tmp_path):
    """Differences for all parameters, each with its own value, land where the checkpoint's key map puts them."""
    config = tiny.transformer(
        qk_norm=TRANSFORMERS[name].qk_norm, guidance_embed=TRANSFORMERS[name].guidance_embed
    ).config
    weights = SanaTransformer(config).state_dict()
    rules = transformer_rules(weights)
    values = {key: torch.full_like(tensor, index + 1) for index, (key, tensor) in enumerate(weights.items())}
    for prefix, names in (("", lambda key: (key,)), ("transformer.", lambda key: diffusers_names(key, rules))):
        tensors = {}
        for key, value in values.items():
            for part, target in zip(value.chunk(len(names(key))), names(key), strict=True):
                module, _, parameter = target.rpartition(".")
                stem, suffix = {"weight": (module, "diff"), "bias": (module, "diff_b")}.get(parameter, (target, "diff"))
                tensors[f"{prefix}{stem}.{suffix}"] = part.clone()
        lora = read(tmp_path, tensors, config)
        model = SanaTransformer(config)
        for parameter in model.parameters():
            parameter.data.zero_()
        apply_lora(model, lora.layers)
        assert not lora.unmatched
        assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())


def test_what_does_not_belong_is_reported(layers, tmp_path):
    extra = {
        "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight": torch.zeros(1, 1),
        "transformer.transformer_blocks.7.attn1.to_q.lora_A.weight": torch.zeros(1, 64),
        "transformer.transformer_blocks.7.attn1.to_q.lora_B.weight": torch.zeros(64, 1),
        "step": torch.zeros(1),
    }
    lora = read(tmp_path, loras.dotted(layers, "transformer.") | extra)
    assert set(lora.unmatched) == extra.keys()
    assert lora.summary.startswith("44 of 48 keys matched, 22 weights changed; not in this model: ")
    assert lora.summary.endswith(" and 1 more")


SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
FOREIGN = [
    ("LoRA for SDXL", f"{SDXL}.lora_down.weight"),
    ("LoRA for SDXL", "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight"),
    ("LoRA for SDXL", "lycoris_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.lokr_w1"),
    (
        "LoRA for Stable Diffusion 1, 2 or XL",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight",
    ),
    ("LoRA for Flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    ("LoRA for Flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"),
    ("LoRA for Stable Diffusion 3", "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"),
    ("LoRA for PixArt", "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight"),
    ("LoRA for a text encoder alone", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    (
        "LoRA for another model, with keys such as diffusion_model.layers",
        "diffusion_model.layers.0.attention.out.lora_A.weight",
    ),
    ("Sana transformer", "blocks.0.mlp.inverted_conv.conv.weight"),
    ("CLIP text encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
]


@pytest.mark.parametrize("what, key", FOREIGN)
def test_foreign_files_are_refused(what, key, tmp_path):
    with pytest.raises(CheckpointError, match=rf"lora.safetensors: none of its 2 keys .* looks like a {what}.* Choose"):
        read(tmp_path, {key: torch.zeros(2, 8), "step": torch.tensor(2.0)})


def broken(layers, change):
    tensors = loras.dotted(layers, "transformer.")
    change(tensors)
    return tensors


KEY = "transformer.transformer_blocks.1.attn2.to_k"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(72, 3)}),
            r"\[72, 3\] and .*another size",
        ),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(2, 64)}), r"to_k.lora_A.weight \[2, 64\] instead of"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(64)}), r"to_k.lora_A.weight \[64\] instead of"),
        (lambda t: t.update({f"{KEY}.diff_b": torch.zeros(65)}), r"to_k.diff_b \[65\] instead of \[64, 1\]"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), f"incomplete: of {KEY} it has only {KEY}.lora_A.weight"),
        (lambda t: t[f"{KEY}.lora_B.weight"].fill_(torch.nan), "to_k.lora_B.weight holds NaN"),
        (lambda t: t.update({f"{KEY}.dora_scale": torch.ones(64, 1)}), "is DoRA"),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector.weight": torch.ones(64)}), "is DoRA"),
        (lambda t: t.update({"lycoris_transformer_blocks_0_attn1_to_q.lokr_w1": torch.ones(2, 2)}), "is LoKr"),
        (lambda t: t.update({f"diffusion_model.{key[12:]}": t[key].clone() for key in list(t)[:2]}), "twice"),
    ],
)
def test_broken_files_are_refused(change, message, layers, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, broken(layers, change))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_metadata_is_refused(text, layers, tmp_path):
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is not"):
        read(tmp_path, loras.dotted(layers), metadata={"lora_adapter_metadata": text})
