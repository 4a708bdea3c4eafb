"""Pictures to latents and back, in as much memory as there is: whole where it suffices, else in tiles."""

from functools import partial

import torch
from torch import Tensor

from .finite import require_finite
from .models.dc_ae import DCAE
from .models.memory import choose_tile, decode_memory, encode_memory, free_memory
from .models.tiling import decode_tiled, encode_tiled


def encode_pixels(vae: DCAE, pixels: Tensor, tiling: bool | None = None) -> Tensor:
    """Scaled latents [B, C, h, w], float32, of pixels [B, 3, H, W] in 0..1.

    tiling: True encodes in tiles, False whole; None in tiles if the GPU's free memory does not hold the whole.
    Raises FloatingPointError for NaN or infinity.
    """
    pixels = (2 * pixels - 1).to(_device(vae), vae.dtype)
    memory = partial(encode_memory, vae.config, *pixels.shape[-2:], vae.dtype)
    latents = _each(vae, vae.encode, encode_tiled, pixels, memory, tiling)
    return require_finite(latents, "the DC-AE encoder") * vae.config.scaling_factor


def decode_latents(vae: DCAE, latents: Tensor, tiling: bool | None = None) -> Tensor:
    """Pixels [B, 3, H, W] in 0..1, float32, of scaled latents [B, C, h, w]. `tiling` and errors as above."""
    latents = (latents / vae.config.scaling_factor).to(_device(vae), vae.dtype)
    height, width = (side * vae.config.spatial_compression for side in latents.shape[-2:])
    memory = partial(decode_memory, vae.config, height, width, vae.dtype)
    pixels = _each(vae, vae.decode, decode_tiled, latents, memory, tiling)
    return (require_finite(pixels, "the DC-AE decoder") / 2 + 0.5).clamp(0, 1)


def _each(vae: DCAE, whole, tiled, batch: Tensor, memory, tiling: bool | None) -> Tensor:
    """One at a time: the autoencoder's widest feature maps take far more memory than the pictures."""
    return torch.cat([_one(vae, whole, tiled, item, memory, tiling).float() for item in batch.split(1)])


def _one(vae: DCAE, whole, tiled, item: Tensor, memory, tiling: bool | None) -> Tensor:
    available = free_memory(item.device)
    if tiling is None:
        tiling = available is not None and memory() > available
    return tiled(vae, item, choose_tile(vae.config, memory, available)) if tiling else whole(item)


def _device(vae: DCAE) -> torch.device:
    return next(vae.parameters()).device
