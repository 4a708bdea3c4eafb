"""Sana Prompt Encode: styles, what it shows, and core's own Gemma-2."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from sana_core.checkpoint import load_text_encoder, save_text_encoder
from sana_core.styles import NO_STYLE, STYLES, apply_style
from sana_core.text import CHI, TextEncoder
from tests import tiny

PROMPT = "a red cat 红色背景 🐼"
LONG = " ".join(f"word{number}" for number in range(200))
SIZES = {
    "vocab_size": len(tiny.tokenizer()),
    "hidden_size": tiny.CHANNELS,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def clip(part, tiny_models):
    return part("nodes.clip").load_clip(tiny_models / "text_encoders" / "tiny.safetensors")


@pytest.fixture
def node(part):
    return part("nodes.conditioning").SanaPromptEncode


@pytest.fixture
def encode(node):
    return lambda *args, **options: node.execute(*args, **options).result[0]


@pytest.fixture(scope="module")
def core_file(tmp_path_factory):
    """A Gemma-2 of tiny sizes, but for the 256 wide heads that core is fixed to, and core's file format."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=256, attn_implementation="eager")
    path = tmp_path_factory.mktemp("gemma") / "gemma_2_2b_it_elm_bf16.safetensors"
    save_text_encoder(TextEncoder(tiny.filled(Gemma2Model(config)), tiny.tokenizer()), path)
    return path


@pytest.fixture(scope="module")
def core_clip(comfy, core_file):
    """What core's CLIPLoader makes of the file for type pixeldit; the sizes are all that it does not read."""
    options = {"gemma2_2b_model_config": SIZES, "dtype": torch.float32}
    return comfy.sd.load_clip([str(core_file)], clip_type=comfy.sd.CLIPType.PIXELDIT, model_options=options)


@pytest.fixture
def shown(node, part, monkeypatch):
    """What the front end is told: (node, text) pairs."""
    told = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id: told.append((node_id, text)))
    monkeypatch.setattr(part("nodes.notice").PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="12"), raising=False)
    return told


def equal(one, other):
    return torch.equal(one[0][0], other[0][0]) and torch.equal(
        one[0][1]["attention_mask"], other[0][1]["attention_mask"]
    )


@pytest.mark.parametrize("style", [name for name in STYLES if name != NO_STYLE])
def test_a_style_has_words_for_the_prompt_and_for_the_negative_prompt(clip, encode, style):
    prompt, negative = apply_style(style, PROMPT, "text")
    assert equal(encode(clip, PROMPT, style=style), encode(clip, prompt))
    assert equal(encode(clip, "text", False, style=f"{style} (negative)"), encode(clip, negative, False))
    assert equal(encode(clip, "", False, style=f"{style} (negative)"), encode(clip, STYLES[style].negative, False))


def test_without_a_style_the_text_passes_unchanged(clip, encode):
    assert equal(encode(clip, PROMPT, style=NO_STYLE), encode(clip, PROMPT))
    assert equal(encode(clip, "", style=NO_STYLE), encode(clip, ""))


def test_the_choices_are_the_styles_of_the_demo(node):
    (style,) = (entry for entry in node.define_schema().inputs if entry.id == "style")
    assert style.default == NO_STYLE == style.options[0]
    assert set(style.options) == set(STYLES) | {f"{name} (negative)" for name in STYLES if name != NO_STYLE}
    assert inspect.signature(node.execute).parameters["style"].default == NO_STYLE, "older graphs have no style"


def test_the_node_shows_how_long_the_text_is(clip, encode, shown):
    tokens = len(tiny.tokenizer().encode(PROMPT)) - 1
    encode(clip, PROMPT, False)
    encode(clip, "", False)
    assert shown == [("12", f"{tokens} of 299 tokens"), ("12", "0 of 299 tokens")]


@pytest.mark.parametrize("use_instruction", [True, False])
def test_the_node_shows_the_first_words_that_were_cut(clip, encode, shown, use_instruction):
    encode(clip, LONG, use_instruction)
    ((_, text),) = shown
    instruction = CHI if use_instruction else False
    (row,) = clip.cond_stage_model.encoder.tokenize(LONG, chi=instruction)
    assert text.startswith(f"{row.prompt_tokens} of 299 tokens\n")
    assert f'from "{row.cut_text[:40]}" on' in text and row.cut_text
    assert "".join((row.kept_text + row.cut_text).split()) == "".join(LONG.split()), "nothing is counted twice or lost"


def test_without_a_front_end_nothing_is_shown(clip, encode):
    assert encode(clip, PROMPT)


def test_core_pixeldit_clip_is_accepted(part, core_clip, encode, tiny_models, caplog, shown):
    positive, negative = encode(core_clip, PROMPT), encode(core_clip, "", False)
    assert "official instruction" not in caplog.text
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")
    latent = {"samples": torch.zeros(1, 32, 2, 2), "downscale_ratio_spacial": 32}
    sampler = part("nodes.sampling").SanaSampler
    with torch.inference_mode():
        (sampled,) = sampler.execute(model, positive, negative, latent, 1, 2, 4.5, "flow_dpm-solver").result
    assert positive[0][0].shape == (1, 300, tiny.CHANNELS)
    assert sampled["samples"].isfinite().all() and sampled["samples"].std() > 0
    tokens = int(positive[0][1]["attention_mask"].sum()) - 1
    assert [text for _, text in shown] == [f"{tokens} of 299 tokens", "0 of 299 tokens"]


@pytest.mark.parametrize("text", [PROMPT, "", LONG], ids=["prompt", "empty", "long"])
def test_core_encodes_as_we_do_but_for_soft_capping(core_clip, core_file, text):
    """Core's CLIPTextEncode on the same file: same tokens, same mask, and, without the capping, the same features."""
    from nodes import CLIPTextEncode

    ((features, extra),) = CLIPTextEncode().encode(core_clip, text)[0]
    ours = load_text_encoder(core_file, dtype=torch.float32)
    capped, mask = ours.encode(text)
    for layer in ours.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped, _ = ours.encode(text)
    assert torch.equal(extra["attention_mask"].long(), mask)
    kept = mask.bool()
    assert (features - uncapped)[kept].abs().max() < 1e-4
    assert ((features - capped)[kept].abs().max() > 1e-3) == bool(text), "one token alone has nothing to be capped"


def test_core_pixeldit_clip_cannot_leave_the_instruction_out(core_clip, encode, caplog):
    encode(core_clip, PROMPT, False)
    assert "always puts the official instruction" in caplog.text
