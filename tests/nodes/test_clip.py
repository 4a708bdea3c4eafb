"""The CLIP encodes as the plain text encoder does, through stock nodes too."""

import pytest
import torch

from sana_core.checkpoint import load_text_encoder
from sana_core.text import CHI
from tests import tiny

PROMPT = "a red cat 红色背景 🐼"


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "text_encoders" / "tiny.safetensors"


@pytest.fixture(scope="module")
def encoder(path):
    return load_text_encoder(path)


@pytest.fixture(scope="module")
def clip(part, path):
    return part("nodes.clip").load_clip(path)


@pytest.fixture
def encode(part):
    return lambda *args: part("nodes.conditioning").SanaPromptEncode.execute(*args).result[0]


def stock_encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def same(conditioning, expected):
    ((embeds, extra),) = conditioning
    return torch.equal(embeds, expected[0]) and torch.equal(extra["attention_mask"], expected[1])


def test_has_every_attribute_of_a_core_clip(clip, comfy):
    class Nothing(torch.nn.Module):
        dtypes = set()

        def __init__(self, **_):
            super().__init__()

    target = type("Target", (), {"params": {}, "clip": Nothing, "tokenizer": lambda **_: None})
    assert vars(comfy.sd.CLIP(target)).keys() <= vars(clip).keys()


def test_stock_nodes_get_the_instruction(clip, encoder):
    assert same(stock_encode(clip, PROMPT), encoder.encode(PROMPT, chi=True))


def test_an_empty_text_is_the_null_caption(clip, encoder, encode):
    expected = encoder.encode("", chi=False)
    assert same(stock_encode(clip, ""), expected) and same(encode(clip, " ", True, CHI), expected)
    assert expected[1].sum() == 1


def test_the_instruction_may_be_left_out_or_replaced(clip, encoder, encode):
    assert same(encode(clip, PROMPT), encoder.encode(PROMPT, chi=True))
    assert same(encode(clip, PROMPT, False, CHI), encoder.encode(PROMPT, chi=False))
    assert same(encode(clip, PROMPT, True, "Draw: "), encoder.encode(PROMPT, chi="Draw: "))
    assert same(encode(clip, PROMPT, True, " "), encoder.encode(PROMPT, chi=False))


def test_features_are_float32_of_300_positions(clip):
    ((embeds, extra),) = stock_encode(clip, PROMPT)
    assert embeds.shape == (1, 300, tiny.CHANNELS) and embeds.dtype == torch.float32
    assert extra["attention_mask"].shape == (1, 300) and extra["pooled_output"] is None


def test_a_clone_is_as_good(clip):
    assert torch.equal(stock_encode(clip.clone(), PROMPT)[0][0], stock_encode(clip, PROMPT)[0][0])


def test_other_clips_are_refused(part, comfy, encode):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="no Gemma-2 as Sana uses it"):
        encode(SimpleNamespace(tokenizer=object()), PROMPT)
    with pytest.raises(ValueError, match="for l, g"):
        part("nodes.clip").GemmaEncoder(tiny.text_encoder()).encode_token_weights({"l": [], "g": []})


@pytest.fixture
def core_clip(comfy):
    """What core's CLIPLoader makes for type pixeldit, with a Gemma-2 of tiny sizes."""
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders.pixeldit import PixelDiTGemma2Tokenizer, pixeldit_te

    sizes = {
        "vocab_size": len(tiny.tokenizer()),
        "hidden_size": tiny.CHANNELS,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    spiece = torch.frombuffer(bytearray(tiny.tokenizer().model), dtype=torch.uint8)
    clip = comfy.sd.CLIP(
        ClipTarget(PixelDiTGemma2Tokenizer, pixeldit_te()),
        tokenizer_data={"spiece_model": spiece},
        model_options={"gemma2_2b_model_config": sizes, "dtype": torch.float32},
    )
    tiny.filled(clip.cond_stage_model)
    return clip


def test_core_pixeldit_clip_is_accepted(part, core_clip, encode, tiny_models, caplog):
    positive, negative = encode(core_clip, PROMPT), encode(core_clip, "", False)
    assert "official instruction" not in caplog.text
    model = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")
    latent = {"samples": torch.zeros(1, 32, 2, 2), "downscale_ratio_spacial": 32}
    sampler = part("nodes.sampling").SanaSampler
    with torch.inference_mode():
        (sampled,) = sampler.execute(model, positive, negative, latent, 1, 2, 4.5, "flow_dpm-solver").result
    assert positive[0][0].shape == (1, 300, tiny.CHANNELS)
    assert sampled["samples"].isfinite().all() and sampled["samples"].std() > 0


def test_core_pixeldit_clip_cannot_leave_the_instruction_out(core_clip, encode, caplog):
    encode(core_clip, PROMPT, False)
    assert "always puts the official instruction" in caplog.text


@pytest.mark.parametrize(
    "flag, expected", [("fp16_text_enc", torch.float32), ("bf16_text_enc", torch.bfloat16), (None, torch.float32)]
)
def test_never_runs_in_float16(part, path, comfy, monkeypatch, flag, expected):
    from comfy.cli_args import args

    if flag:
        monkeypatch.setattr(args, flag, True)
    clip = part("nodes.clip").load_clip(path)
    assert clip.cond_stage_model.encoder.dtype == expected
    assert clip.cond_stage_model.dtypes == {expected}
    assert stock_encode(clip, PROMPT)[0][0].isfinite().all()


def test_float32_that_does_not_fit_becomes_bfloat16(part, path, comfy, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1000)
    assert part("nodes.clip").load_clip(path).cond_stage_model.encoder.dtype == torch.bfloat16


def test_nan_is_named_by_its_stage(part, path):
    clip = part("nodes.clip").load_clip(path)
    clip.cond_stage_model.transformer.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="text encoder returned NaN"):
        stock_encode(clip, PROMPT)


def test_core_can_make_a_fresh_copy(clip):
    assert clip.patcher.is_clip
    load, arguments = clip.patcher.cached_patcher_init
    fresh = load(*arguments, disable_dynamic=True)
    weights, copied = clip.cond_stage_model.state_dict(), fresh.model.state_dict()
    assert weights.keys() == copied.keys() and all(torch.equal(weights[key], copied[key]) for key in weights)


def test_memory_estimate_covers_a_layer(clip):
    assert clip.cond_stage_model.memory_estimation_function({}) > 640 * tiny.CHANNELS * 4
