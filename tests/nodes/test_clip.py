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


def loaded_clips(comfy, clip):
    return [entry for entry in comfy.model_management.current_loaded_models if entry.model is clip.patcher]


def test_the_manager_unloads_it_for_another_model_and_loads_it_again(part, path, comfy, tiny_models):
    clip = part("nodes.clip").load_clip(path)
    expected = stock_encode(clip, PROMPT)[0][0]
    assert loaded_clips(comfy, clip), "encoding must go through ComfyUI's memory management"
    comfy.model_management.free_memory(1e30, clip.patcher.load_device)
    assert not loaded_clips(comfy, clip)
    assert torch.equal(stock_encode(clip, PROMPT)[0][0], expected)
    assert loaded_clips(comfy, clip)


def test_it_goes_to_the_offload_device_whole(part, path, comfy, monkeypatch):
    """A second device that any machine has: the moves to it are recorded, not made."""
    management = comfy.model_management
    patcher = part("nodes.clip").load_clip(path).patcher
    assert patcher.offload_device == management.text_encoder_offload_device() == torch.device("cpu")
    patcher.load_device = torch.device("meta")
    moves = []
    monkeypatch.setattr(patcher.model, "to", lambda device: moves.append(torch.device(device)))
    loaded = management.LoadedModel(patcher)
    loaded.model_load(lowvram_model_memory=1)
    assert moves == [torch.device("meta")] and patcher.loaded_size() == patcher.model_size()
    assert loaded.model_unload(memory_to_free=1), "a part would do, but it leaves as a whole"
    assert moves == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_leaves_and_comes_back(part, path, comfy, monkeypatch):
    clip = part("nodes.clip").load_clip(path)
    clip.patcher.load_device = torch.device("cuda", 0)
    expected = stock_encode(clip, PROMPT)[0][0]
    assert clip.cond_stage_model.encoder.device.type == "cuda"
    comfy.model_management.free_memory(1e30, clip.patcher.load_device)
    assert clip.cond_stage_model.encoder.device.type == "cpu"
    assert torch.equal(stock_encode(clip, PROMPT)[0][0], expected)
