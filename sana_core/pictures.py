"""Pictures to pixels and back, and to files: PIL's RGB pictures, and tensors [B, 3, H, W] in 0..1."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .finite import require_finite

METADATA_KEY = "sana"  # not "prompt", which ComfyUI reads as a graph when the picture is dropped on its canvas


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures of pixels [B, 3, H, W] in 0..1."""
    bytes_ = (pixels * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture) for picture in rearrange(bytes_, "b c h w -> b h w c").numpy()]


def to_pixels(pictures: Image.Image | Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Pixels [B, 3, height, width] in 0..1 of pictures, scaled to fill the size; what exceeds it is cut evenly."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    return torch.stack([_pixels(picture, height, width) for picture in pictures])


def encode_image(
    vae, image: Image.Image | Sequence[Image.Image] | Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Scaled float32 latents [1 or B, C, h, w] of what image to image starts from.

    image: one for all or one each: pictures, which are scaled and cut to the size, pixels [., 3, H, W] in 0..1, or
        scaled latents [., C, h, w].
    shape: [B, C, h, w] of the latents to sample.
    device: where the autoencoder is.

    Raises ValueError for a tensor of another shape, FloatingPointError for NaN or infinity.
    """
    count, channels, *size = shape
    height, width = (side * vae.config.spatial_compression for side in size)
    if not isinstance(image, Tensor):
        image = to_pixels(image, height, width)
    allowed = [(rows, *rest) for rest in ((3, height, width), (channels, *size)) for rows in sorted({1, count})]
    if tuple(image.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected {expected}: pixels or latents")
    image = require_finite(image.to(device), "whatever made the image")
    if image.shape[1] == channels:
        return image.float()
    pixels = (2 * image - 1).to(vae.dtype)
    latents = torch.cat([vae.encode(picture) for picture in pixels.split(1)]).float()
    return require_finite(latents, "the DC-AE encoder") * vae.config.scaling_factor


def write_png(picture: Image.Image, path: Path, metadata: dict) -> None:
    """Write a picture with its metadata as JSON in a tEXt chunk; a file of that name is replaced only by a whole one.

    Raises OSError that says what could not be written, for example for want of space.
    """
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))  # escapes whatever tEXt, which is Latin-1, cannot hold
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write the picture ({error.strerror or error})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    bytes_ = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return rearrange(bytes_.float() / 255, "(h w c) -> c h w", h=height, w=width)
