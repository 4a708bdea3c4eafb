"""Our networks and diffusers' with the very same weights, which both hold in the same memory."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import AutoModel, BatchEncoding, Gemma2Config

from sana_core.checkpoint import load_dc_ae, load_text_encoder, load_tokenizer, load_transformer
from sana_core.checkpoint.configuration import dc_ae_to_diffusers, transformer_to_diffusers
from sana_core.checkpoint.keys import dc_ae_rules, official_to_diffusers, transformer_rules
from sana_core.config import AUTOENCODERS, TRANSFORMERS, SanaConfig
from sana_core.kernels import best_kernels
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from sana_core.text import TextEncoder, Tokenizer

MODELS = Path(__file__).resolve().parents[1] / "models"
NANO, DC_AE, DC_AE_NANO = "sana-nano", "dc-ae-f32c32-sana-1.1", "dc-ae-nano"
NANO_TEXT = MODELS / "text_encoders" / "gemma2_nano.safetensors"


@dataclass(frozen=True)
class Place:
    """Where networks compute, and the dtype of their weights."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_exact(self) -> bool:
        """Whether results differ by the order of float32 sums alone."""
        return self.dtype == torch.float32


@dataclass(frozen=True, eq=False)
class Pair:
    """One network twice, with the same weights."""

    ours: nn.Module
    theirs: nn.Module


@lru_cache(maxsize=1)
def transformers(config: SanaConfig, place: Place) -> Pair:
    """A transformer with random weights, or the shipped sana-nano."""
    factory = {"device": place.device, "dtype": place.dtype}
    if config == TRANSFORMERS[NANO]:
        return pair_transformer(load_transformer(MODELS / "diffusion_models" / "sana_nano.safetensors", **factory))
    return pair_transformer(randomize(SanaTransformer(config, kernels=best_kernels(place.device), **factory)))


@lru_cache(maxsize=1)
def autoencoders(name: str, place: Place) -> Pair:
    """A DC-AE with random weights, or the shipped one."""
    factory = {"device": place.device, "dtype": place.dtype}
    if name == DC_AE_NANO:
        return pair_dc_ae(load_dc_ae(MODELS / "vae" / "dc_ae_nano.safetensors", **factory))
    return pair_dc_ae(randomize(DCAE(AUTOENCODERS[name], **factory)))


@lru_cache(maxsize=1)
def text_encoder(name: str, place: Place) -> TextEncoder:
    """Gemma-2-2b with random weights and sana-nano's vocabulary, or the shipped encoder of sana-nano."""
    if name == NANO:
        return load_text_encoder(NANO_TEXT, device=place.device, dtype=place.dtype)
    with place.device:
        model = AutoModel.from_config(Gemma2Config(), dtype=place.dtype, attn_implementation="eager")
    return TextEncoder(model.eval().requires_grad_(False), load_tokenizer(NANO_TEXT))


def float32(network: nn.Module) -> nn.Module:
    """A copy that computes in float32."""
    return copy.deepcopy(network).float()


def float64(network: nn.Module) -> nn.Module:
    """A copy that computes in float64, but for what it always does in float32."""
    return copy.deepcopy(network).double()


@torch.no_grad()
def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, so that the size of activations stays about the same from layer to layer."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        gain = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.normal_(0, gain, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)  # of a norm
    return network.eval().requires_grad_(False)


def pair_transformer(ours: SanaTransformer) -> Pair:
    """Diffusers' transformer beside ours, its cross-attention q/k norms at the authors' eps of 1e-6."""
    theirs = SanaTransformer2DModel.from_config(transformer_to_diffusers(ours.config))
    _share(ours, theirs, transformer_rules)
    for block in theirs.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6
    return Pair(ours, theirs)


def pair_dc_ae(ours: DCAE) -> Pair:
    """Diffusers' autoencoder beside ours."""
    theirs = AutoencoderDC.from_config(dc_ae_to_diffusers(ours.config))
    return _share(ours, theirs, dc_ae_rules)


def _share(ours: nn.Module, theirs: nn.Module, rules) -> Pair:
    ours.requires_grad_(False)
    weights = ours.state_dict()
    theirs.load_state_dict(official_to_diffusers(weights, rules(weights)), assign=True)
    theirs.to(next(ours.parameters()).device).eval().requires_grad_(False)  # buffers are no weights
    return Pair(ours, theirs)


class HuggingFaceTokenizer:
    """What diffusers asks a tokenizer for, over ours."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids, BOS first."""
        return self.tokenizer.encode(text)

    def __call__(self, texts: list[str], *, max_length: int, **_) -> BatchEncoding:
        """Ids, cut and padded on the right, as the official recipe has them."""
        rows = [self.encode(text)[:max_length] for text in texts]
        padding = [max_length - len(row) for row in rows]
        ids = [row + [self.tokenizer.pad] * count for row, count in zip(rows, padding, strict=True)]
        masks = [[1] * len(row) + [0] * count for row, count in zip(rows, padding, strict=True)]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)})
