"""Pictures that a drawing starts from or follows, as latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .autoencoder import encode_pixels
from .finite import require_finite
from .models.dc_ae import DCAE
from .pictures import to_mask, to_pixels
from .sampler.inpaint import inpaint_denoiser, latent_mask

Pictures = Image.Image | Sequence[Image.Image] | Tensor


@dataclass(frozen=True)
class Source:
    """A picture, one for all or one each, and what of it is to be drawn anew.

    latents: [1 or B, C, h, w], scaled, float32.
    pixels: [1 or B, 3, H, W] in 0..1; None if only latents are known.
    mask: [1 or B, 1, H, W] in 0..1, 1 = draw anew; None stands for all of it.
    """

    latents: Tensor
    pixels: Tensor | None = None
    mask: Tensor | None = None

    def keep_unmasked(self, model: Callable[..., Tensor], noise: Tensor) -> Callable[..., Tensor]:
        """The denoiser, held to the picture where the mask leaves it alone."""
        if self.mask is None:
            return model
        compression = self.mask.shape[-1] // self.latents.shape[-1]
        return inpaint_denoiser(model, self.latents, noise, latent_mask(self.mask, compression))

    def paste_unmasked(self, pixels: Tensor) -> Tensor:
        """Drawn pixels [B, 3, H, W], with the picture's own where the mask leaves it alone: no decoder is exact."""
        if self.mask is None or self.pixels is None:
            return pixels
        return torch.lerp(self.pixels, pixels, self.mask)


def prepare_source(vae: DCAE, image: Pictures, mask: Pictures | None, shape: tuple[int, ...]) -> Source:
    """The source for latents of a shape [B, C, h, w].

    image: pictures, which are scaled and cut to the size, pixels [., 3, H, W] in 0..1, or scaled latents [., C, h, w].
    mask: pictures, white for what is to be drawn anew, or a tensor [., 1, H, W] in 0..1.

    Raises ValueError for tensors of another shape or a mask outside 0..1, FloatingPointError for NaN or infinity.
    """
    latents, pixels = encode_pictures(vae, "image", image, shape)
    height, width = _pixel_size(vae, shape)
    mask = None if mask is None else _prepare_mask(mask, shape[0], height, width).to(latents.device)
    return Source(latents, pixels, mask)


def encode_pictures(vae: DCAE, name: str, pictures: Pictures, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Scaled latents [1 or B, C, h, w] of what is given under a name, and its pixels [., 3, H, W] if it has any.

    Arguments and errors are those of `prepare_source`.
    """
    count, channels, *size = shape
    height, width = _pixel_size(vae, shape)
    if not isinstance(pictures, Tensor):
        pictures = to_pixels(pictures, height, width)
    _check_shape(name, pictures, count, (3, height, width), (channels, *size))
    pictures = require_finite(pictures.to(next(vae.parameters()).device, torch.float32), f"whatever made the {name}")
    return (pictures, None) if pictures.shape[1] == channels else (encode_pixels(vae, pictures), pictures)


def _pixel_size(vae: DCAE, shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = (side * vae.config.spatial_compression for side in shape[-2:])
    return height, width


def _prepare_mask(mask: Pictures, count: int, height: int, width: int) -> Tensor:
    if not isinstance(mask, Tensor):
        mask = to_mask(mask, height, width)
    _check_shape("mask", mask, count, (1, height, width))
    mask = require_finite(mask.float(), "whatever made the mask")
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"the mask goes from {mask.min():g} to {mask.max():g}, expected values of 0 to 1")
    return mask


def _check_shape(name: str, tensor: Tensor, count: int, *expected: tuple[int, ...]) -> None:
    allowed = [(rows, *rest) for rest in expected for rows in sorted({1, count})]
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"the {name} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, allowed))}")
