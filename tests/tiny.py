"""Complete models of a few thousand random weights, for tests of what is around the networks."""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import sentencepiece
import torch
from transformers import Gemma2Config, Gemma2Model

from sana_core.config import AUTOENCODERS, SanaConfig
from sana_core.kernels import best_kernels
from sana_core.models.controlnet import SanaControlNet
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from sana_core.text import CHI, TextEncoder, Tokenizer

CHANNELS = 32  # of the text features
SENTENCES = (
    "a red cat on the left of a blue background",
    "two green birds sleep under a warm yellow sun",
    "红色背景左边的熊猫",
    *CHI.split("\n"),  # so that the instruction is some 250 tokens, as with the real tokenizer, and not 1,400 letters
)
TRANSFORMER = SanaConfig(depth=2, hidden_size=64, num_cross_heads=2, caption_channels=CHANNELS, image_size=96)
DC_AE = replace(
    AUTOENCODERS["dc-ae-nano"],
    encoder_channels=(8, 8, 16, 16, 32, 32),
    decoder_channels=(8, 8, 16, 16, 32, 32),
    encoder_depths=(0, 1, 1, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1, 1, 1),
)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The same random weights each time, in whatever its layers leave uninitialised too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + norm)
    return model.eval()


def transformer(**changes) -> SanaTransformer:
    """With the kernels that a loaded one gets."""
    return filled(SanaTransformer(replace(TRANSFORMER, **changes), kernels=best_kernels("cpu")))


def sprint() -> SanaTransformer:
    return transformer(guidance_embed=True, qk_norm=True)


def controlnet(**changes) -> SanaControlNet:
    """Of the tiny transformer, of which it copies the first of the two blocks."""
    return filled(SanaControlNet(replace(TRANSFORMER, **{"depth": 1} | changes), kernels=best_kernels("cpu")))


def dc_ae(**changes) -> DCAE:
    return filled(DCAE(replace(DC_AE, **changes)))


def inputs(timesteps: Sequence[float], tokens: int) -> dict[str, torch.Tensor]:
    """What a transformer reads for as many pictures as there are timesteps, with captions of so many tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(len(timesteps), 32, 3, 5, generator=generator),
        "timesteps": torch.tensor(timesteps),
        "context": torch.randn(len(timesteps), tokens, CHANNELS, generator=generator),
    }


def sentencepiece_model(sentences: Sequence[str], vocab_size: int) -> bytes:
    """A model with Gemma's settings: no normalisation, bytes for what it has no piece for, Gemma's special ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(sentencepiece_model(SENTENCES, 900))


def text_encoder() -> TextEncoder:
    config = Gemma2Config(
        vocab_size=len(tokenizer()),
        hidden_size=CHANNELS,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        attn_implementation="eager",
    )
    return TextEncoder(filled(Gemma2Model(config)), tokenizer())


def conditioning(seed: int, tokens: int = 9) -> list:
    """ComfyUI's CONDITIONING of a caption of so many tokens in 20, its features random."""
    embeds = torch.randn(1, 20, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return [[embeds, {"attention_mask": (torch.arange(20) < tokens).long()[None]}]]
