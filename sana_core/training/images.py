"""Picture files as training reads them: upright, RGB, nothing hidden under transparency, nothing clipped."""

import io
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ..resolution import Size
from .buckets import cover_size

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # in any case
NOT_READ = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff")  # pictures, too, to be converted first
BACKGROUND = "white"  # under transparent pictures
LANCZOS_AREA = 2**21  # pixels: above every bucket of 1024 px, below every one of 2048 px

PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # names of chunks and of texts


class ImageError(ValueError):
    """A picture that cannot be read: says which, and why."""


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The whole picture, decoded: RGB, turned upright by its EXIF orientation.

    Transparency is laid over white, 16 bits a channel are scaled to 8, CMYK is converted, of an animation the first
    frame is taken.

    Args:
        source: a file, or its content.
        name: what errors call it; the default is the file's path.

    Raises:
        ImageError: missing, truncated, damaged, no picture, or larger than Pillow's limit against bombs.
    """
    try:
        with _open(source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, EOFError ...
        raise ImageError(f"{name or _name(source)}: {_reason(error)}") from error


def read_size(source: Path | bytes, name: str | None = None) -> Size:
    """Size of the upright picture, of its header alone where the format allows it. Errors as `read_image`."""
    try:
        with _open(source) as image:
            if image.format == "TIFF":
                image.load()  # Pillow turns these itself, and which of its versions swaps the sides when differs
            if image.format == "PNG" and not _may_be_turned(source):
                return Size(image.height, image.width)
            sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that swap the sides
            return Size(image.width, image.height) if sideways else Size(image.height, image.width)
    except Exception as error:  # as above
        raise ImageError(f"{name or _name(source)}: {_reason(error)}") from error


def is_animated(source: Path | bytes) -> bool:
    """Whether the file holds more frames than the first, which is the only one used."""
    with _open(source) as image:
        return getattr(image, "n_frames", 1) > 1


def fit_to_bucket(image: Image.Image, height: int, width: int) -> Tensor:
    """Pixels [3, height, width] in 0..1: scaled to cover the bucket, then cut to it around the centre.

    Bicubic, and Lanczos from 2048 px on (NVlabs/Sana `sana_data_multi_scale.py`, which has bicubic again at 4096).
    """
    cover = cover_size(image.height, image.width, Size(height, width))
    resampling = Image.Resampling.LANCZOS if height * width > LANCZOS_AREA else Image.Resampling.BICUBIC
    resized = image.resize((cover.width, cover.height), resampling)
    top, left = round((cover.height - height) / 2), round((cover.width - width) / 2)
    cropped = resized.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
    return rearrange(pixels.float() / 255, "(h w c) -> c h w", h=height, w=width)


def _open(source: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _may_be_turned(png: Path | bytes) -> bool:
    """Whether the file can hold an orientation: Pillow decodes all of a PNG to look for one behind the picture."""
    content = png if isinstance(png, bytes) else png.read_bytes()
    return any(mark in content for mark in PNG_ORIENTATION_MARKS)


def _name(source: Path | bytes) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture, or one of a kind that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large ({error})"
    return f"it is damaged or cannot be converted ({error or type(error).__name__})"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # which `convert` would clip at 255
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16-bit integers, or of floats in 0..1."""
    values = np.asarray(image).astype(np.float64)
    limit = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= limit):  # so that NaN fails too
        raise ValueError(f"grey values go from {values.min():g} to {values.max():g}, expected 0 to {limit}")
    return Image.fromarray((values * (255 / limit)).round().astype(np.uint8))
