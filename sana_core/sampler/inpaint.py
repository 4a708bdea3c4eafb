"""Inpainting with any model: where a mask leaves a picture alone, every step is shown that picture."""

from collections.abc import Callable

import torch
from torch import Tensor


def inpaint_denoiser(model: Callable[..., Tensor], image: Tensor, noise: Tensor, mask: Tensor) -> Callable[..., Tensor]:
    """`model(x, sigma, **extra_args) -> denoised` that keeps the image [B, C, h, w] where the mask [B, 1, h, w] is 0.

    There the model sees the image at the noise level of the step, (1 - sigma) * image + sigma * noise, and what it
    denoises is replaced by the image; 1 leaves it to the model, and values between mix. This is the blending of latents
    of RePaint (Lugmayr et al., arXiv:2201.09865) without its resampling, as ComfyUI does it for a noise mask.
    """

    def denoiser(x: Tensor, sigma: Tensor, **extra_args) -> Tensor:
        known = torch.lerp(image, noise, sigma.reshape(-1, 1, 1, 1))
        return torch.lerp(image, model(torch.lerp(known, x, mask), sigma, **extra_args), mask)

    return denoiser


def latent_mask(mask: Tensor, compression: int) -> Tensor:
    """The mask [B, 1, h, w] of latents under a mask of pixels [B, 1, H, W]: a position takes the most of its pixels."""
    return torch.nn.functional.max_pool2d(mask, compression)
