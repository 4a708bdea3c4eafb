import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from sana_core.checkpoint import CheckpointError, load_text_encoder, save_text_encoder
from sana_core.checkpoint.gemma import _config_of_shapes
from sana_core.text import TextEncoder
from tests import tiny
from tests.checkpoint import manifests

PROMPTS = ["a red cat", "红色背景左边的熊猫 🐼", ""]


@pytest.fixture(scope="module")
def encoder():
    return tiny.text_encoder()


def causal_model(encoder):
    """The whole language model, as Google's repository has it."""
    model = Gemma2ForCausalLM(encoder.model.config).eval()
    model.model.load_state_dict(encoder.model.state_dict())
    return model


def assert_same(loaded, encoder):
    """Equal features: weights, and the buffers that no file holds."""
    for found, wanted in zip(loaded.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        assert torch.equal(found, wanted)
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "eager"


def write_tokenizer(folder):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny.tokenizer().model)


def save_comfyui(path, encoder, **extra):
    """ComfyUI's single file: Hugging Face's keys, the tokenizer as a tensor, no metadata."""
    state_dict = {f"model.{key}": tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    state_dict["spiece_model"] = torch.frombuffer(bytearray(encoder.tokenizer.model), dtype=torch.uint8)
    save_file(state_dict | extra, path)


def with_heads_of_256():
    """Small, but with the size of heads that every published Gemma-2 has, so that shapes are enough."""
    config = Gemma2Config(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    return TextEncoder(tiny.filled(Gemma2Model(config)), tiny.tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(encoder, dtype, tmp_path):
    original = TextEncoder(Gemma2Model(encoder.model.config).to(dtype).eval(), encoder.tokenizer)
    save_text_encoder(original, tmp_path / "m.safetensors")
    loaded = load_text_encoder(tmp_path / "m.safetensors")
    assert loaded.dtype == dtype and loaded.tokenizer.model == encoder.tokenizer.model
    found, wanted = loaded.model.state_dict(), original.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_features_survive_the_file(encoder, tmp_path):
    save_text_encoder(encoder, tmp_path / "m.safetensors")
    assert_same(load_text_encoder(tmp_path / "m.safetensors"), encoder)


def test_saved_file_has_the_keys_that_comfyui_detects(encoder, tmp_path):
    save_text_encoder(encoder, tmp_path / "m.safetensors")
    state_dict = load_file(tmp_path / "m.safetensors")
    assert "model.layers.0.post_feedforward_layernorm.weight" in state_dict
    assert bytes(state_dict["spiece_model"].numpy()) == encoder.tokenizer.model


def test_single_file_without_metadata_is_read_by_its_shapes(tmp_path):
    original = with_heads_of_256()
    save_comfyui(tmp_path / "m.safetensors", original)
    assert_same(load_text_encoder(tmp_path / "m.safetensors"), original)


def test_published_shapes_give_the_published_configuration():
    keys = manifests.unfold(manifests.facts()["gemma"]["keys"])
    found = _config_of_shapes({key.removeprefix("model."): tensor for key, tensor in keys.items()}, None)
    published = manifests.facts()["gemma"]["config"]
    assert found == {name: published[name] for name in found}
    defaults = Gemma2Config(**found).to_dict()
    for name in ("attn_logit_softcapping", "query_pre_attn_scalar", "rms_norm_eps", "sliding_window", "pad_token_id"):
        assert defaults[name] == published[name]


@pytest.mark.parametrize("whole", [True, False], ids=["Gemma2ForCausalLM", "Gemma2Model"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}, {"variant": "bf16", "max_shard_size": "30KB"}])
def test_hugging_face_folder(encoder, whole, options, tmp_path):
    (causal_model(encoder) if whole else encoder.model).save_pretrained(tmp_path, **options)
    assert not options or len(list(tmp_path.glob("*-of-*"))) > 1
    write_tokenizer(tmp_path)
    assert_same(load_text_encoder(tmp_path), encoder)


def test_pipeline_folder(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path, tmp_path / "text_encoder"):
        assert_same(load_text_encoder(path), encoder)


def test_odd_file_name_in_a_folder(encoder, tmp_path):
    """As in Efficient-Large-Model/gemma-2-2b-it."""
    causal_model(encoder).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gemma-2-2b-it.safetensors")
    write_tokenizer(tmp_path)
    assert_same(load_text_encoder(tmp_path), encoder)
    assert_same(load_text_encoder(tmp_path / "gemma-2-2b-it.safetensors"), encoder)


def test_untied_head_is_dropped(tmp_path):
    original = with_heads_of_256()
    head = {"lm_head.weight": original.model.embed_tokens.weight.detach().clone()}
    save_comfyui(tmp_path / "m.safetensors", original, **head)
    assert_same(load_text_encoder(tmp_path / "m.safetensors"), original)


@pytest.mark.parametrize("stored, asked", [(torch.float16, None), (torch.float32, torch.float16)])
def test_float16_becomes_bfloat16_with_a_log_line(stored, asked, tmp_path, caplog):
    original = with_heads_of_256()
    original.model.to(stored)
    save_comfyui(tmp_path / "m.safetensors", original)
    with caplog.at_level(logging.INFO):
        loaded = load_text_encoder(tmp_path / "m.safetensors", dtype=asked)
    assert loaded.dtype == torch.bfloat16
    assert "Gemma-2 overflows in torch.float16, so it is loaded in torch.bfloat16" in caplog.text


def test_cast_keeps_the_rotary_frequencies_in_float32(encoder, tmp_path):
    save_text_encoder(encoder, tmp_path / "m.safetensors")
    loaded = load_text_encoder(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, encoder.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("scaled", [True, False])
def test_8_bit_file_is_refused_with_a_pointer_to_core(scaled, tmp_path):
    original = with_heads_of_256()
    key = "model.layers.0.mlp.up_proj.weight"
    extra = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)} if scaled else {}
    save_comfyui(tmp_path / "m.safetensors", original, **extra, **{key: torch.zeros(48, 32).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="8 bits.*CLIPLoader.*pixeldit"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_missing_tokenizer_is_named(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer: .*spiece_model.*tokenizer.model"):
        load_text_encoder(tmp_path)


def test_damaged_tokenizer_is_named(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="tokenizer.model: these .* bytes are not a SentencePiece model"):
        load_text_encoder(tmp_path)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    original = with_heads_of_256()
    config = Gemma2Config(**{**original.model.config.to_dict(), "vocab_size": 99})
    save_text_encoder(TextEncoder(Gemma2Model(config), original.tokenizer), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="embeddings for 99 pieces"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_heads_that_nothing_tells_are_an_error(encoder, tmp_path):
    save_comfyui(tmp_path / "m.safetensors", encoder)
    with pytest.raises(CheckpointError, match="number of heads.*config.json"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_transformer_is_no_text_encoder(tmp_path):
    save_file(tiny.transformer().state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="is not a Gemma-2 text encoder: it looks like a Sana transformer.*2b-it"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_other_language_model_is_refused(tmp_path):
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="a language model other than Gemma-2"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_missing_weights_are_named(tmp_path):
    original = with_heads_of_256()
    save_comfyui(tmp_path / "m.safetensors", original)
    state_dict = load_file(tmp_path / "m.safetensors")
    del state_dict["model.layers.1.mlp.up_proj.weight"]
    save_file(state_dict, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="missing: layers.1.mlp.up_proj.weight"):
        load_text_encoder(tmp_path / "m.safetensors")


@pytest.mark.parametrize("content", ["{", '{"hidden_size": "wide"}'])
def test_damaged_configuration_is_named(encoder, content, tmp_path):
    save_comfyui(tmp_path / "m.safetensors", encoder)
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors", metadata={"gemma_config": content})
    with pytest.raises(CheckpointError, match="m.safetensors: its (gemma_config|configuration)"):
        load_text_encoder(tmp_path / "m.safetensors")


def test_config_json_of_another_model_is_ignored(tmp_path):
    original = with_heads_of_256()
    save_comfyui(tmp_path / "m.safetensors", original)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SanaTransformer2DModel"}))
    assert_same(load_text_encoder(tmp_path / "m.safetensors"), original)
