"""ControlNet files: the official one, which holds the base as well, diffusers', and what is neither."""

import json
import re

import pytest
import torch
from diffusers import SanaControlNetModel
from safetensors.torch import save_file

from sana_core.checkpoint import (
    CheckpointError,
    convert_controlnet,
    detect_controlnet,
    load_controlnet,
    load_transformer,
    save_controlnet,
    save_transformer,
)
from sana_core.checkpoint.keys import CONTROLNET_RULES, official_to_diffusers
from sana_core.config import CONTROLNETS, TRANSFORMERS
from sana_core.models.controlnet import SanaControlNet
from tests import tiny, twin
from tests.checkpoint import manifests
from tests.checkpoint.test_keys import by_published_map, narrow

SMALL, LARGE = manifests.CONTROLNETS
UNUSED = re.compile(r"blocks\..*|final_layer\..*|pos_embed|y_embedder\.y_embedding")  # of the base, by diffusers


def branch_of(state_dict):
    return {key: tensor for key, tensor in state_dict.items() if key.startswith("controlnet.")}


def with_base(net, base):
    """The official file: the base model, the branch, and the buffers that are no weights."""
    buffers = {"pos_embed": torch.zeros(1, 9, 64), "y_embedder.y_embedding": torch.zeros(300, 32)}
    return {**buffers, **base.state_dict(), **net.state_dict()}


def same(net, expected):
    found, wanted = net.state_dict(), expected.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", manifests.CONTROLNETS)
@pytest.mark.parametrize("layout", manifests.LAYOUTS)
def test_published_files_are_detected_and_fit_strictly(name, layout):
    state_dict = manifests.state_dict("controlnet", name, layout)
    assert len(state_dict) == manifests.facts()["controlnet"][name]["n_keys"][manifests.LAYOUTS.index(layout)]
    config, found, reason = detect_controlnet(state_dict)
    assert (config, found) == (CONTROLNETS[name], layout) and name in reason
    model = SanaControlNet(config, device="meta").state_dict()
    assert manifests.shapes(convert_controlnet(state_dict, layout)) == manifests.shapes(model)


@pytest.mark.parametrize("name", manifests.CONTROLNETS)
def test_official_becomes_the_diffusers_manifest(name):
    official = manifests.state_dict("controlnet", name, "official")
    needed = {key: tensor for key, tensor in official.items() if not UNUSED.fullmatch(key)}
    converted = official_to_diffusers(needed, CONTROLNET_RULES)
    assert manifests.shapes(converted) == manifests.shapes(manifests.state_dict("controlnet", name, "diffusers"))


def test_values_go_where_the_published_map_says_and_come_back():
    official = narrow(branch_of(manifests.state_dict("controlnet", SMALL, "official")))
    converted = official_to_diffusers(official, CONTROLNET_RULES)
    expected = by_published_map(official, manifests.facts()["keymap"]["controlnet"])
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    back = convert_controlnet(converted, "diffusers")
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in official)


def test_presets_are_the_first_blocks_of_their_base():
    for name, base in ((SMALL, "Sana_600M_1024px"), (LARGE, "Sana_1600M_1024px_BF16")):
        assert vars(CONTROLNETS[name]) == vars(TRANSFORMERS[base]) | {"depth": 7}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_own_file_round_trip(dtype, tmp_path):
    net = tiny.controlnet()
    save_controlnet(net, tmp_path / "net.safetensors")
    loaded = load_controlnet(tmp_path / "net.safetensors", dtype=dtype)
    assert loaded.config == net.config and not loaded.training
    assert same(loaded, net.to(dtype))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_only_the_branch_of_an_official_file_is_loaded(prefix, tmp_path):
    net, base = tiny.controlnet(), tiny.transformer()
    content = {prefix + key: tensor for key, tensor in with_base(net, base).items()}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps(twin.controlnet_config(net.config)))
    assert same(load_controlnet(tmp_path / "net.pth"), net)


@pytest.mark.parametrize("inside", ["", "controlnet"])
def test_folders_that_diffusers_wrote(inside, tmp_path):
    net = tiny.controlnet()
    twin.controlnet(net, tiny.transformer()).save_pretrained(tmp_path / "pipeline" / inside, max_shard_size="30KB")
    loaded = load_controlnet(tmp_path / "pipeline")
    assert same(loaded, net)
    assert (loaded.config.num_cross_heads, loaded.config.head_dim) == (2, 32)


def test_diffusers_opens_the_converted_weights():
    theirs = twin.controlnet(tiny.controlnet(), tiny.transformer())
    assert isinstance(theirs, SanaControlNetModel)


@pytest.mark.parametrize(
    "name, layout", [("net.safetensors", "diffusers"), ("net.pth", "official"), ("net", "official")]
)
def test_other_layouts_and_files_are_not_written(name, layout, tmp_path):
    with pytest.raises(CheckpointError, match='layout "official" to a .safetensors file'):
        save_controlnet(tiny.controlnet(), tmp_path / name, layout=layout)
    assert list(tmp_path.iterdir()) == []


def refused(tmp_path, state_dict, **options):
    save_file({key: tensor.contiguous() for key, tensor in state_dict.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_controlnet(tmp_path / "wrong.safetensors", **options)
    assert "wrong.safetensors" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda: tiny.transformer().state_dict(), "it looks like a Sana transformer"),
        (lambda: tiny.dc_ae().state_dict(), "it looks like a DC-AE autoencoder"),
        (lambda: {"zero_convs.0.0.weight": torch.ones(1), "input_blocks.0.0.weight": torch.ones(1)}, "another model"),
        (lambda: {"controlnet_blocks.0.weight": torch.ones(1), "x_embedder.weight": torch.ones(1)}, "another model"),
    ],
    ids=["transformer", "autoencoder", "stable diffusion", "flux"],
)
def test_other_files_are_named(content, words, tmp_path):
    message = refused(tmp_path, content())
    assert "is not a Sana ControlNet" in message and words in message


def test_damaged_files_are_refused(tmp_path):
    whole = with_base(tiny.controlnet(), tiny.transformer())
    config = {"sana_config": json.dumps(vars(tiny.controlnet().config))}

    def message(change):
        state_dict = dict(whole)
        change(state_dict)
        save_file(state_dict, tmp_path / "wrong.safetensors", metadata=config)
        with pytest.raises(CheckpointError) as error:
            load_controlnet(tmp_path / "wrong.safetensors")
        return str(error.value)

    assert "missing: controlnet.0.after_proj.bias" in message(lambda file: file.pop("controlnet.0.after_proj.bias"))
    assert "not expected: optimizer.step" in message(lambda file: file.update({"optimizer.step": torch.ones(1)}))
    misshapen = {"controlnet.0.before_proj.weight": torch.ones(2, 2)}
    assert "controlnet.0.before_proj.weight [2, 2] instead of [64, 64]" in message(lambda file: file.update(misshapen))
    half = {"controlnet.0.copied_block.mlp.inverted_conv.conv.weight": torch.ones(320, 32, 1, 1)}
    assert "hidden_size 32" in message(lambda file: file.update(half))


def test_unknown_sizes_and_wrong_variants_are_refused(tmp_path):
    state_dict = tiny.controlnet().state_dict()
    message = refused(tmp_path, state_dict)
    assert "no published ControlNet has these sizes" in message and SMALL in message
    assert "hidden_size 64" in refused(tmp_path, state_dict, variant=SMALL)
    with pytest.raises(CheckpointError, match="no ControlNet variant 'HED'. Choose one of: Sana_600M"):
        load_controlnet(tmp_path / "wrong.safetensors", variant="HED")


def test_float8_has_no_layers_to_compute_with(tmp_path):
    net = tiny.controlnet().to(torch.float8_e4m3fn)
    save_controlnet(net, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="torch.nn cannot compute"):
        load_controlnet(tmp_path / "net.safetensors")


def test_a_transformer_is_not_read_from_a_controlnet_file(tmp_path):
    save_controlnet(tiny.controlnet(), tmp_path / "net.safetensors")
    save_transformer(tiny.transformer(), tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="it looks like a Sana ControlNet"):
        load_transformer(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="it looks like a Sana transformer"):
        load_controlnet(tmp_path / "base.safetensors")
