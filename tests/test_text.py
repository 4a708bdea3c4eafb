import inspect
import io
import logging
from functools import cache
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from diffusers import SanaPipeline
from transformers import BatchEncoding, Gemma2Model

from sana_core.text import CHI, CaptionCache, TextEncoder, Tokenizer, select_positions
from tests import tiny

SENTENCES = (*CHI.split("\n"), *tiny.SENTENCES, "a photo of the moon over the sea at night")
PROMPTS = (
    "A Cat, on the LEFT of a red background",
    "红色背景左边的熊猫",
    "🐼🌊",
    'Mixed 中文, English "quotes"\nand 🧑‍🚀 — naïve  spaces',
)


@cache
def sentencepiece_model() -> bytes:
    return tiny.sentencepiece_model(SENTENCES, 1200)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece_model())


@cache
def encoder() -> TextEncoder:
    config = tiny.text_encoder().model.config
    config.vocab_size = len(tokenizer())
    return TextEncoder(tiny.filled(Gemma2Model(config)), tokenizer())


class HuggingFaceTokenizer:
    """What diffusers calls, over SentencePiece alone."""

    def __init__(self):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())

    def encode(self, text):
        return [2] + self.processor.encode(text)

    def __call__(self, texts, padding, max_length, truncation, add_special_tokens, return_tensors):
        assert (padding, truncation, add_special_tokens, return_tensors) == ("max_length", True, True, "pt")
        rows = [self.encode(text)[:max_length] for text in texts]
        masks = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
        ids = [row + [0] * (max_length - len(row)) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)})


def direct_features(model, prompt, instruction):
    """The official recipe, step by step, on SentencePiece and transformers themselves."""
    tokenize = HuggingFaceTokenizer()
    length = len(tokenize.encode(instruction)) + 300 - 2 if instruction else 300
    inputs = tokenize([instruction + prompt], "max_length", length, True, True, "pt")
    with torch.no_grad():
        hidden = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    select = [0] + list(range(-300 + 1, 0))
    return hidden[:, select], inputs.attention_mask[:, select]


def test_instruction_is_the_official_text():
    diffusers = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert CHI == "\n".join(diffusers).replace("'Enhanced prompt'", '"Enhanced prompt"')
    assert CHI.count("\n") == 7 and CHI.endswith("User Prompt: ") and CHI.count('"Enhanced prompt"') == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instruction", [CHI, "", "Draw this: "], ids=["official", "none", "own"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["english", "chinese", "emoji", "mixed"])
def test_features_are_those_of_transformers(prompt, instruction, dtype):
    model = TextEncoder(Gemma2Model(encoder().model.config).eval(), tokenizer())
    model.model.load_state_dict(encoder().model.state_dict())
    for parameter in model.model.parameters():
        parameter.data = parameter.data.to(dtype)
    chi = True if instruction == CHI else instruction or False
    embeds, mask = model.encode(prompt, chi=chi)
    expected, expected_mask = direct_features(model.model, prompt, instruction)
    assert embeds.shape == (1, 300, tiny.CHANNELS) and embeds.dtype == dtype
    assert torch.equal(embeds, expected)
    assert torch.equal(mask, expected_mask)


def test_features_are_those_of_diffusers():
    """Diffusers lower-cases and strips; otherwise it must agree, padding included."""
    pipe = SimpleNamespace(tokenizer=HuggingFaceTokenizer(), text_encoder=encoder().model)
    pipe._text_preprocessing = lambda text, clean_caption: SanaPipeline._text_preprocessing(pipe, text, clean_caption)
    prompts = ["a cat in the snow", "红色背景左边的熊猫 🐼"]
    with torch.no_grad():
        embeds, mask = SanaPipeline._get_gemma_prompt_embeds(
            pipe, prompts, torch.device("cpu"), torch.float32, complex_human_instruction=CHI.split("\n")
        )
        negative, negative_mask = SanaPipeline._get_gemma_prompt_embeds(
            pipe, ["blurry"], torch.device("cpu"), torch.float32, complex_human_instruction=False
        )
    select = [0] + list(range(-299, 0))
    ours, our_mask = encoder().encode(prompts)
    assert torch.equal(ours, embeds[:, select]) and torch.equal(our_mask, mask[:, select])
    ours, our_mask = encoder().encode("blurry", chi=False)
    assert torch.equal(ours, negative) and torch.equal(our_mask, negative_mask)


def test_soft_capping_is_used():
    """Attention other than eager drops it silently, which only large scores show."""
    sharp = Gemma2Model(encoder().model.config).eval()
    with torch.no_grad():
        for name, parameter in sharp.named_parameters():
            parameter.normal_(0, 2 if "q_proj" in name or "k_proj" in name else 0.3)
    capped, _ = TextEncoder(sharp, tokenizer()).encode(PROMPTS[0])
    for layer in sharp.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped, _ = TextEncoder(sharp, tokenizer()).encode(PROMPTS[0])
    assert (capped - uncapped).abs().max() > 0.01


@pytest.mark.parametrize("text", PROMPTS)
def test_text_passes_unchanged(text):
    ids = tokenizer().encode(text)
    assert ids[0] == 2
    assert tokenizer().decode(ids) == text


def test_unknown_characters_become_their_bytes():
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [processor.id_to_piece(piece) for piece in tokenizer().encode("🐼")[1:]]
    assert pieces == [f"<0x{byte:02X}>" for byte in "🐼".encode()]


def test_control_pieces_in_a_prompt_are_plain_text():
    assert 1 not in tokenizer().encode("</s><pad>") and tokenizer().decode(tokenizer().encode("</s>")) == "</s>"


@pytest.mark.parametrize("prompt", ["", "  \n"])
@pytest.mark.parametrize("chi", [True, False, "Draw this: "])
def test_empty_prompt_is_the_null_caption(prompt, chi):
    (row,) = encoder().tokenize(prompt, chi=chi)
    assert row.ids == [2] + [0] * 299 and row.mask == [1] + [0] * 299
    embeds, mask = encoder().encode(prompt, chi=chi)
    assert mask.sum() == 1
    assert torch.equal(embeds, direct_features(encoder().model, "", "")[0])


def test_instruction_changes_the_features_and_not_the_mask():
    with_chi, mask = encoder().encode("a red cat")
    without, plain_mask = encoder().encode("a red cat", chi=False)
    assert torch.equal(mask, plain_mask)
    assert (with_chi - without)[mask.bool()].abs().max() > 0.01


def test_selection_starts_at_the_prompt():
    (row,) = encoder().tokenize("a red cat")
    selected = [row.ids[position] for position in select_positions(len(row.ids))]
    end = row.prompt_tokens + 1
    # The space that ends the instruction has merged with the first word.
    assert selected[0] == 2 and tokenizer().decode(selected[1:end]) == " a red cat"
    assert set(selected[end:]) == {0}


def test_white_space_around_a_prompt_makes_no_difference():
    assert encoder().tokenize("  a red cat\n") == encoder().tokenize("a red cat")


def test_batch_of_all_lengths_equals_its_rows():
    prompts = ["a red cat", "", PROMPTS[3], "sea " * 400]
    embeds, mask = encoder().encode(prompts)
    for index, prompt in enumerate(prompts):
        alone, alone_mask = encoder().encode(prompt)
        assert torch.equal(mask[index : index + 1], alone_mask)
        torch.testing.assert_close(embeds[index : index + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chi", [True, False])
def test_long_prompt_is_cut_with_a_warning_that_says_where(chi, caplog):
    words = [f"word{number}" for number in range(400)]
    (row,) = encoder().tokenize(" ".join(words), chi=chi)
    assert row.prompt_tokens > 299
    assert " ".join(words).startswith(row.kept_text)
    with caplog.at_level(logging.WARNING, logger="sana_core.text"):
        embeds, mask = encoder().encode(" ".join(words), chi=chi)
    assert f'"...{row.kept_text[-40:]}"' in caplog.text and f"{row.prompt_tokens} tokens" in caplog.text
    assert f'from "{row.cut_text[:40]}" on' in caplog.text
    assert "".join((row.kept_text + row.cut_text).split()) == "".join(words)
    assert mask.sum() == 300
    again, _ = encoder().encode(" ".join([*words, "and more"]), chi=chi)
    assert torch.equal(embeds, again)


@pytest.mark.parametrize("chi", [True, False])
def test_prompt_of_299_tokens_is_whole(chi, caplog):
    pieces = tokenizer().encode("sea " * 400)[1:300]
    prompt = tokenizer().decode(pieces).strip()
    while len(tokenizer().encode(prompt)) < 300:
        prompt += "é"  # a byte or two at a time
    (row,) = encoder().tokenize(prompt, chi=chi)
    expected = len(tokenizer().encode(prompt)) - 1
    assert row.prompt_tokens == expected
    assert (row.warning is None) == (expected <= 299)


def test_cut_inside_a_character_leaves_no_broken_text():
    (row,) = encoder().tokenize("x" + "🐼" * 200, chi=False)  # 1 + 4 bytes each: the cut falls within one
    assert row.kept_text == "x" + "🐼" * 74


def test_count_is_of_the_prompt_alone():
    tokens = len(tokenizer().encode("a red cat")) - 1
    assert encoder().tokenize("a red cat", chi=False)[0].count == f"{tokens} of 299 tokens"
    assert encoder().tokenize(" a red cat", chi=True)[0].count == f"{tokens} of 299 tokens"
    assert encoder().tokenize("", chi=True)[0].count == "0 of 299 tokens"


@pytest.fixture
def calls():
    """Rows that Gemma read, one entry a forward call."""
    rows = []
    hook = encoder().model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield rows
    hook.remove()


def test_cache_encodes_a_text_once(calls):
    cached = CaptionCache(encoder())
    first = cached.encode(["a red cat", "", "a red cat"])
    assert calls == [1, 1]
    again = cached.encode([" a red cat\n", "  ", "a red cat"])
    assert calls == [1, 1]
    for one, other, expected in zip(first, again, encoder().encode(["a red cat", "", "a red cat"]), strict=True):
        assert torch.equal(one, other) and torch.allclose(one.float(), expected.float(), rtol=0, atol=1e-5)
    embeds, mask = cached.encode("a red cat")
    assert torch.equal(embeds, encoder().encode("a red cat")[0]) and torch.equal(mask, encoder().encode("a red cat")[1])


def test_cache_tells_instructions_apart(calls):
    cached = CaptionCache(encoder())
    rows = [cached.encode("a red cat", chi=chi)[0] for chi in (True, False, "Draw: ", CHI)]
    assert len(calls) == 3 and torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    cached.encode("", chi=True), cached.encode("", chi=False)
    assert len(calls) == 4, "an empty prompt has no instruction"


def test_cache_forgets_the_text_that_was_not_asked_for_longest(calls):
    cached = CaptionCache(encoder(), size=2)
    for prompt in ("a cat", "the sea", "a cat", "a photo", "a cat"):
        cached.encode(prompt)
    assert len(calls) == 3
    cached.encode("the sea")
    assert len(calls) == 4


def test_cache_survives_what_a_caller_does_to_its_features(calls):
    cached = CaptionCache(encoder())
    embeds, mask = cached.encode("a cat")
    expected = embeds.clone()
    embeds.zero_(), mask.zero_()
    assert torch.equal(cached.encode("a cat")[0], expected) and len(calls) == 1


def test_cache_is_empty_after_a_move(calls):
    cached = CaptionCache(encoder())
    cached.encode("a cat")
    assert cached.to("cpu") is cached
    cached.encode("a cat")
    assert len(calls) == 2


def test_float16_is_refused():
    half = TextEncoder(tiny.text_encoder().model.half(), tiny.tokenizer())
    with pytest.raises(ValueError, match="float16.*bfloat16 or float32"):
        half.encode("a cat")


def test_gradients_stay_possible():
    """Trainers encode captions with this: no inference tensors."""
    embeds, _ = encoder().encode("a cat")
    assert not embeds.is_inference() and not embeds.requires_grad


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 64])
def test_other_bytes_are_no_tokenizer(content):
    with pytest.raises(ValueError, match="SentencePiece"):
        Tokenizer(content)


def test_tokenizer_without_bos_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=150, bos_id=-1, minloglevel=2
    )
    with pytest.raises(ValueError, match="bos"):
        Tokenizer(model.getvalue())
