"""The two networks that are done with before training: what the cache needs of them, and who they are."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autoencoder import encode_pixels
from ..models.dc_ae import DCAE
from ..text import TextEncoder, instruction_text


@dataclass(frozen=True)
class Encoder:
    """A network as a function, whose results are kept under its identity."""

    encode: Callable
    identity: str  # the same for the same weights, settings and dtype, wherever they came from


def latent_encoder(vae: DCAE) -> Encoder:
    """Pixels [1, 3, H, W] in 0..1 -> scaled latents [1, C, h, w] float32."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return encode_pixels(vae, pixels)

    return Encoder(encode, module_identity(vae, vae.config))


def text_feature_encoder(encoder: TextEncoder, chi: bool | str = True) -> Encoder:
    """Caption -> features [1, 300, C] and mask [1, 300]. The instruction `chi` precedes every one but the empty."""
    tokenizer = hashlib.sha256(encoder.tokenizer.model).hexdigest()
    identity = module_identity(encoder.model, instruction_text(chi), tokenizer)
    return Encoder(lambda caption: encoder.encode(caption, chi=chi), identity)


def module_identity(module: nn.Module, *settings: object) -> str:
    """Hash of every weight of a network, with its name, shape and dtype, and of the settings' text.

    Reading the weights instead of naming their file makes it equal for one network loaded by different programs. It
    takes about a second for each GB.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
