import json
import logging
import re
from dataclasses import asdict, replace

import pytest
import torch

from sana_core.checkpoint import (
    CONFIG_KEY,
    TRANSFORMER_ANCHORS,
    CheckpointError,
    config_tensor,
    convert_transformer,
    describe_keys,
    detect_dc_ae,
    detect_transformer,
    dump_config,
    strip_prefix,
)
from sana_core.checkpoint.configuration import (
    dc_ae_from_diffusers,
    dc_ae_to_diffusers,
    parse_config,
    transformer_from_diffusers,
    transformer_to_diffusers,
)
from sana_core.config import AUTOENCODERS, TRANSFORMERS, DCAEConfig, SanaConfig
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from tests.checkpoint import manifests

PLAIN_1600M = "Sana_1600M_1024px"
IN_MIX = [name for name in manifests.DC_AES if "-in-" in name or "-mix-" in name]
PICTURE_FIELDS = {field for field in asdict(TRANSFORMERS[PLAIN_1600M]) if field != "dtype"}


def same_picture(config, preset):
    """Equal in all that changes a picture: the presets of one architecture differ in the dtype that is advised."""
    return all(getattr(config, name) == getattr(TRANSFORMERS[preset], name) for name in PICTURE_FIELDS)


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
def test_official_transformer_tells_itself_but_for_the_teacher(name):
    state_dict = manifests.state_dict("transformer", name, "official")
    config, layout, reason = detect_transformer(state_dict, path=f"checkpoints/{name}.pth")
    assert layout == "official" and same_picture(config, name) and name in reason
    config, _, reason = detect_transformer(state_dict, path="checkpoints/model.pth")
    if name == "Sana_Sprint_1.6B_1024px_teacher":
        assert same_picture(config, "SANA1.5_1.6B_1024px") and name in reason and "variant" in reason
    else:
        assert same_picture(config, name)


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
def test_diffusers_transformer_by_config_json(name):
    state_dict = manifests.state_dict("transformer", name, "diffusers")
    config_json = manifests.facts()["transformer"][name]["config"]
    config, layout, reason = detect_transformer(state_dict, config_json=config_json, path="transformer/model.bin")
    assert layout == "diffusers" and same_picture(config, name) and "config.json" in reason


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
def test_presets_state_what_the_published_files_need(name):
    runtime = manifests.facts()["transformer"][name]["runtime"]
    preset = TRANSFORMERS[name]
    assert preset.image_size == runtime["image_size"]
    assert preset.pos_embed_base == (runtime["pe_base_size"] if runtime["use_pe"] else None)
    assert preset.pos_embed_interpolation == runtime["pe_interpolation"]
    assert preset.qk_norm == runtime["qk_norm"] and preset.guidance_embed == runtime["cfg_embed"]
    if runtime["flow_shift"] is not None:
        assert preset.shift == runtime["flow_shift"]


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
@pytest.mark.parametrize("layout", manifests.LAYOUTS)
def test_variant_overrides_every_guess(name, layout):
    state_dict = manifests.state_dict("transformer", name, layout)
    config, _, _ = detect_transformer(state_dict, variant=name, path="other/Sana_1600M_1024px.pth")
    assert config == TRANSFORMERS[name]


@pytest.mark.parametrize("name", [*manifests.TRANSFORMERS, *manifests.facts()["aliases"]])
@pytest.mark.parametrize("part", ["{}.safetensors", "{}_diffusers/transformer/model.safetensors", "x--{}/a/b/t/m.pth"])
def test_name_chooses_among_equal_shapes(name, part):
    state_dict = manifests.state_dict("transformer", manifests.facts()["aliases"].get(name, name), "diffusers")
    config, _, _ = detect_transformer(state_dict, path=part.format(name))
    assert config == TRANSFORMERS[name]


def test_plain_shapes_default_to_1024_pixels_without_position_embedding():
    state_dict = manifests.state_dict("transformer", "Sana_1600M_4Kpx_BF16", "diffusers")
    config, _, reason = detect_transformer(state_dict, path="model.safetensors")
    assert same_picture(config, PLAIN_1600M)
    assert "Sana_1600M_2Kpx_BF16" in reason and "Sana_1600M_4Kpx_BF16" in reason and "set variant" in reason


def test_a_name_that_does_not_fit_the_shapes_is_no_hint():
    state_dict = manifests.state_dict("transformer", "Sana_600M_1024px", "official")
    config, _, _ = detect_transformer(state_dict, path="Sana_1600M_4Kpx_BF16.pth")
    assert same_picture(config, "Sana_600M_1024px")


@pytest.mark.parametrize("name", manifests.DC_AES)
@pytest.mark.parametrize("layout", manifests.LAYOUTS)
def test_dc_ae_by_its_name(name, layout):
    state_dict = manifests.state_dict("dc_ae", name, layout)
    config, found, reason = detect_dc_ae(state_dict, path=f"vae/{name}.safetensors")
    assert config == AUTOENCODERS[name] and found == layout and name in reason


@pytest.mark.parametrize("name", manifests.DC_AES)
@pytest.mark.parametrize("layout", manifests.LAYOUTS)
def test_dc_ae_by_shapes_alone(name, layout):
    state_dict = manifests.state_dict("dc_ae", name, layout)
    if name not in IN_MIX:
        assert detect_dc_ae(state_dict, path="model.safetensors")[0] == AUTOENCODERS[name]
        return
    twins = [name, name.replace("-in-", "-mix-") if "-in-" in name else name.replace("-mix-", "-in-")]
    with pytest.raises(CheckpointError, match="variant") as error:
        detect_dc_ae(state_dict, path="model.safetensors")
    assert all(twin in str(error.value) for twin in twins)
    assert detect_dc_ae(state_dict, variant=name)[0] == AUTOENCODERS[name]


@pytest.mark.parametrize("name", manifests.DC_AES)
def test_dc_ae_by_config_json(name):
    state_dict = manifests.state_dict("dc_ae", name, "diffusers")
    config, _, _ = detect_dc_ae(state_dict, config_json=manifests.facts()["dc_ae"][name]["config"])
    assert config == AUTOENCODERS[name]
    official = manifests.state_dict("dc_ae", name, "official")
    assert detect_dc_ae(official, config_json={"model_name": name})[0] == AUTOENCODERS[name]


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
def test_model_has_the_published_keys(name):
    expected = convert_transformer(manifests.state_dict("transformer", name, "official"), "official")
    model = SanaTransformer(TRANSFORMERS[name], device="meta")
    assert manifests.shapes(model.state_dict()) == manifests.shapes(expected)


@pytest.mark.parametrize("name", manifests.DC_AES)
def test_autoencoder_has_the_published_keys(name):
    model = DCAE(AUTOENCODERS[name], device="meta")
    assert manifests.shapes(model.state_dict()) == manifests.shapes(manifests.state_dict("dc_ae", name, "official"))


@pytest.mark.parametrize("name", manifests.TRANSFORMERS)
def test_transformer_config_json_is_the_published_one(name):
    published = manifests.facts()["transformer"][name]["config"]
    written = transformer_to_diffusers(TRANSFORMERS[name])
    defaults = {"qk_norm": None, "guidance_embeds": False, "guidance_embeds_scale": 0.1, "timestep_scale": 1.0}
    assert written == {"interpolation_scale": None} | defaults | published


@pytest.mark.parametrize("name", manifests.DC_AES)
def test_dc_ae_config_json_means_the_published_one(name):
    published = manifests.facts()["dc_ae"][name]["config"]
    written = dc_ae_to_diffusers(AUTOENCODERS[name])
    for key, value in published.items():
        if isinstance(written[key], list) and isinstance(value, str):  # one word stands for all stages
            value = [value] * len(written[key])
        assert written[key] == value, key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_config_survives_diffusers(name):
    stated = transformer_from_diffusers(transformer_to_diffusers(TRANSFORMERS[name]))
    assert replace(TRANSFORMERS[name], **stated) == TRANSFORMERS[name]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_dc_ae_config_survives_diffusers(name):
    assert DCAEConfig(**dc_ae_from_diffusers(dc_ae_to_diffusers(AUTOENCODERS[name]))) == AUTOENCODERS[name]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16])
def test_config_travels_as_metadata_or_as_a_tensor(dtype):
    config = replace(TRANSFORMERS["sana-nano"], depth=3, shift=2.5, pos_embed_base=8)
    state_dict = SanaTransformer(config, device="meta").state_dict()
    metadata = {CONFIG_KEY: dump_config(config)}
    assert detect_transformer(state_dict, metadata=metadata)[0] == config
    state_dict[CONFIG_KEY] = config_tensor(config).to(dtype)
    assert detect_transformer(state_dict)[0] == config


def test_own_config_gives_config_json_its_sampling_defaults():
    config = replace(TRANSFORMERS["sana-nano"], depth=3, shift=2.5)
    state_dict = SanaTransformer(config, device="meta").state_dict()
    found, _, _ = detect_transformer(
        state_dict, metadata={CONFIG_KEY: dump_config(config)}, config_json=transformer_to_diffusers(config)
    )
    assert found == config


def test_config_of_a_newer_version_is_read_with_a_warning(caplog):
    content = json.dumps(asdict(TRANSFORMERS["sana-nano"]) | {"novelty": 1})
    with caplog.at_level(logging.WARNING):
        assert parse_config(content, SanaConfig, "file") == TRANSFORMERS["sana-nano"]
    assert "novelty" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '"text"', '{"depth": 2}', dump_config(AUTOENCODERS["dc-ae-nano"])])
def test_damaged_config_is_refused(content):
    with pytest.raises(CheckpointError, match="file.*sana_config is not a SanaConfig"):
        parse_config(content, SanaConfig, "file")


def test_unpublished_sizes_without_config_are_refused():
    config = replace(TRANSFORMERS["sana-nano"], depth=3)
    with pytest.raises(CheckpointError, match="depth 3.*config.json"):
        detect_transformer(SanaTransformer(config, device="meta").state_dict(), path="x.safetensors")


def test_unknown_variant_lists_the_known_ones():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "official")
    with pytest.raises(CheckpointError, match="'Sana_9000B'.*Sana_600M_512px"):
        detect_transformer(state_dict, variant="Sana_9000B")


def test_variant_against_the_shapes_is_an_error():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "official")
    with pytest.raises(CheckpointError, match=r"my.pth has depth 28.*says depth 20.*Choose one of: Sana_600M_512px"):
        detect_transformer(state_dict, variant=PLAIN_1600M, path="my.pth")


def test_variant_against_the_position_embedding_is_an_error():
    state_dict = manifests.state_dict("transformer", "Sana_1600M_4Kpx_BF16", "official")
    with pytest.raises(CheckpointError, match="128 x 128.*Sana_1600M_4Kpx_BF16"):
        detect_transformer(state_dict, variant=PLAIN_1600M)


def test_config_json_against_the_shapes_is_an_error():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "diffusers")
    other = manifests.facts()["transformer"]["SANA1.5_4.8B_1024px"]["config"]
    with pytest.raises(CheckpointError, match="depth 28.*config.json.*depth 60"):
        detect_transformer(state_dict, config_json=other, path="x.safetensors")


def test_own_config_against_the_shapes_is_an_error():
    state_dict = SanaTransformer(TRANSFORMERS["sana-nano"], device="meta").state_dict()
    with pytest.raises(CheckpointError, match="depth 8.*sana_config says depth 28"):
        detect_transformer(state_dict, metadata={CONFIG_KEY: dump_config(TRANSFORMERS["Sana_600M_512px"])})


def test_config_json_of_another_class_is_ignored():
    state_dict = manifests.state_dict("transformer", "Sana_600M_1024px", "official")
    assert detect_transformer(state_dict, config_json={"_class_name": "FluxTransformer2DModel"})[0].depth == 28
    assert detect_dc_ae(manifests.state_dict("dc_ae", "dc-ae-f32c32-sana-1.0", "official"), config_json={"a": 1})


def test_damaged_dc_ae_config_json_is_an_error():
    state_dict = manifests.state_dict("dc_ae", "dc-ae-f32c32-sana-1.0", "diffusers")
    with pytest.raises(CheckpointError, match="config.json beside it is incomplete"):
        detect_dc_ae(state_dict, config_json={"_class_name": "AutoencoderDC"})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "module."])
@pytest.mark.parametrize("layout", manifests.LAYOUTS)
def test_prefixes_are_removed(prefix, layout):
    plain = manifests.state_dict("transformer", "Sana_600M_512px", layout)
    prefixed = {prefix + key: tensor for key, tensor in plain.items()}
    assert strip_prefix(prefixed, TRANSFORMER_ANCHORS.values()).keys() == plain.keys()


def test_other_components_of_a_checkpoint_are_left_out_and_strangers_are_kept():
    transformer = manifests.state_dict("transformer", "Sana_600M_512px", "official")
    state_dict = {"model.diffusion_model." + key: tensor for key, tensor in transformer.items()}
    state_dict |= {"vae.x": torch.zeros(1), "text_encoders.y": torch.zeros(1), "stranger": torch.zeros(1)}
    assert strip_prefix(state_dict, TRANSFORMER_ANCHORS.values()).keys() == transformer.keys() | {"stranger"}


WRONG = {
    "a PixArt model": ["t_block.1.weight", "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight"],
    "an SDXL model": ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
    "a Stable Diffusion model": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a Flux model": ["double_blocks.0.img_attn.qkv.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "the autoencoder of another model": ["encoder.down.0.block.0.conv1.weight", "decoder.norm_out.weight"],
    "a Gemma-2 text encoder": ["model.layers.0.post_feedforward_layernorm.weight"],
    "a language model other than Gemma-2": ["model.layers.0.self_attn.q_proj.weight"],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a CLIP text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "a LoRA": ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "2 keys such as strange, keys": ["strange", "keys"],
}


@pytest.mark.parametrize("looks_like, keys", WRONG.items())
@pytest.mark.parametrize("detect, noun", [(detect_transformer, "Sana transformer"), (detect_dc_ae, "DC-AE")])
def test_wrong_files_are_named(looks_like, keys, detect, noun):
    state_dict = {key: torch.empty(4, 4, device="meta") for key in keys}
    with pytest.raises(CheckpointError, match=f"mine.safetensors is not a {noun}.*{re.escape(looks_like)}"):
        detect(state_dict, path="mine.safetensors")


def test_published_files_are_described():
    described = {
        (kind, layout): {describe_keys(manifests.state_dict(kind, name, layout)) for name in names}
        for kind, names in (
            ("transformer", manifests.TRANSFORMERS),
            ("controlnet", manifests.CONTROLNETS),
            ("dc_ae", manifests.DC_AES),
        )
        for layout in manifests.LAYOUTS
    }
    assert described == {
        ("transformer", "official"): {"it looks like a Sana transformer"},
        ("transformer", "diffusers"): {"it looks like a Sana transformer (diffusers layout)"},
        ("controlnet", "official"): {"it looks like a Sana ControlNet"},
        ("controlnet", "diffusers"): {"it looks like a Sana ControlNet (diffusers layout)"},
        ("dc_ae", "official"): {"it looks like a DC-AE autoencoder"},
        ("dc_ae", "diffusers"): {"it looks like a DC-AE autoencoder (diffusers layout)"},
    }
    assert describe_keys(manifests.unfold(manifests.facts()["gemma"]["keys"])) == "it looks like a Gemma-2 text encoder"


@pytest.mark.parametrize("swap", [False, True])
def test_transformer_and_autoencoder_are_not_confused(swap):
    transformer = manifests.state_dict("transformer", PLAIN_1600M, "official")
    autoencoder = manifests.state_dict("dc_ae", "dc-ae-f32c32-sana-1.0", "diffusers")
    with pytest.raises(CheckpointError, match="DC-AE autoencoder|Sana transformer"):
        detect_dc_ae(transformer) if swap else detect_transformer(autoencoder)


def test_incomplete_file_is_named():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "official")
    del state_dict["x_embedder.proj.weight"]
    with pytest.raises(CheckpointError, match="half.pth lacks x_embedder.proj.weight"):
        detect_transformer(state_dict, path="half.pth")
