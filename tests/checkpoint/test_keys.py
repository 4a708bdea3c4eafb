import re

import pytest
import torch

from sana_core.checkpoint import convert_dc_ae, convert_transformer
from sana_core.checkpoint.files import CheckpointError
from sana_core.checkpoint.keys import dc_ae_rules, official_to_diffusers, transformer_rules
from tests.checkpoint import manifests

BUFFERS = re.compile(r"pos_embed|y_embedder\.y_embedding|logvar_linear\..*")
KINDS = {"transformer": (convert_transformer, transformer_rules), "dc_ae": (convert_dc_ae, dc_ae_rules)}
FILES = [*(("transformer", name) for name in manifests.TRANSFORMERS), *(("dc_ae", name) for name in manifests.DC_AES)]
SMALL = [("transformer", "Sana_1600M_2Kpx_BF16"), ("transformer", "Sana_Sprint_0.6B_1024px")] + [
    ("dc_ae", name) for name in ("dc-ae-f32c32-sana-1.0", "dc-ae-lite-f32c32-sana-1.1", "dc-ae-f64c128-in-1.0")
]
SHARED_MAP = {
    "Sana_1600M_2Kpx_BF16": "transformer",
    "Sana_Sprint_0.6B_1024px": "transformer_sprint",
    "dc-ae-f32c32-sana-1.0": "dcae_sana",
    "dc-ae-lite-f32c32-sana-1.1": "dcae_lite",
    "dc-ae-f64c128-in-1.0": "dcae_in_mix",
}


def without_buffers(state_dict):
    return {key: tensor for key, tensor in state_dict.items() if not BUFFERS.fullmatch(key)}


def narrow(state_dict):
    """Random tensors of 1/16 width under the same keys, so that their values can be compared."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn([max(1, size // 16) if size > 16 else size for size in tensor.shape], generator=generator)
        for key, tensor in state_dict.items()
    }


def by_published_map(state_dict, rules):
    """The checked key map (original -> diffusers), read by a few lines that share nothing with the package."""
    norm = "weight|bias|running_mean|running_var|num_batches_tracked"
    names = {"i": r"\d+", "s": r"\d+", "p": "weight|bias", "n": norm}
    converted = {}
    for key, tensor in state_dict.items():
        for original, targets, operation in rules:
            pattern = re.sub(r"\\{(\w)\\}", lambda match: f"(?P<{match[1]}>{names[match[1]]})", re.escape(original))
            match = re.fullmatch(pattern, key)
            if match is None:
                continue
            if "squeeze" in operation:
                tensor = tensor.squeeze(3).squeeze(2)
            parts = torch.tensor_split(tensor, len(targets)) if len(targets) > 1 else [tensor] * len(targets)
            for target, part in zip(targets, parts, strict=True):
                converted[target.format(**match.groupdict())] = part
            break
        else:
            raise AssertionError(f"the published map has no rule for {key}")
    return converted


@pytest.mark.parametrize("kind, name", FILES)
def test_official_becomes_the_diffusers_manifest(kind, name):
    official = without_buffers(manifests.state_dict(kind, name, "official"))
    diffusers = manifests.state_dict(kind, name, "diffusers")
    assert len(diffusers) == manifests.facts()[kind][name]["n_keys"][1]
    converted = official_to_diffusers(official, KINDS[kind][1](official))
    assert manifests.shapes(converted) == manifests.shapes(diffusers)


@pytest.mark.parametrize("kind, name", FILES)
def test_diffusers_becomes_the_official_manifest(kind, name):
    official = manifests.state_dict(kind, name, "official")
    assert len(official) == manifests.facts()[kind][name]["n_keys"][0]
    converted = KINDS[kind][0](manifests.state_dict(kind, name, "diffusers"), "diffusers")
    assert manifests.shapes(converted) == manifests.shapes(without_buffers(official))


@pytest.mark.parametrize("kind, name", SMALL)
def test_values_go_where_the_published_map_says(kind, name):
    official = narrow(without_buffers(manifests.state_dict(kind, name, "official")))
    expected = by_published_map(official, manifests.facts()["keymap"][SHARED_MAP[name]])
    converted = official_to_diffusers(official, KINDS[kind][1](official))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind, name", SMALL)
def test_there_and_back_is_bit_equal(kind, name):
    official = narrow(without_buffers(manifests.state_dict(kind, name, "official")))
    convert, rules = KINDS[kind]
    back = convert(official_to_diffusers(official, rules(official)), "diffusers")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_conversion_leaves_its_argument_alone():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "diffusers")
    count = len(state_dict)
    convert_transformer(state_dict, "diffusers")
    assert len(state_dict) == count


def test_buffers_are_dropped_from_official_files():
    official = manifests.state_dict("transformer", "Sana_Sprint_1.6B_1024px", "official")
    dropped = official.keys() - convert_transformer(official, "official").keys()
    assert dropped == {"pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"}


def test_incomplete_and_unknown_keys_survive_for_the_strict_load():
    state_dict = manifests.state_dict("transformer", "Sana_600M_512px", "diffusers")
    del state_dict["transformer_blocks.3.attn1.to_k.weight"]
    state_dict["transformer_blocks.3.extra.weight"] = torch.zeros(1)
    converted = convert_transformer(state_dict, "diffusers")
    assert "blocks.3.attn.qkv.weight" not in converted
    assert "transformer_blocks.3.attn1.to_q.weight" in converted and "transformer_blocks.3.extra.weight" in converted


def test_names_without_a_counterpart_cannot_be_saved_for_diffusers():
    state_dict = {"x_embedder.proj.weight": torch.zeros(1), "controlnet.0.before_proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="controlnet.0.before_proj.weight"):
        official_to_diffusers(state_dict, transformer_rules(state_dict))


def test_unknown_layout_is_refused():
    with pytest.raises(CheckpointError, match='"official" or "diffusers"'):
        convert_transformer({}, "kohya")
