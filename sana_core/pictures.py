"""Pictures to pixels and back, and to files: PIL's RGB pictures, and tensors [B, 3, H, W] in 0..1."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

METADATA_KEY = "sana"  # not "prompt", which ComfyUI reads as a graph when the picture is dropped on its canvas
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures of pixels [B, 3, H, W] in 0..1."""
    bytes_ = (pixels * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture) for picture in rearrange(bytes_, "b c h w -> b h w c").numpy()]


def to_pixels(pictures: Image.Image | Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Pixels [B, 3, height, width] in 0..1 of pictures, scaled to fill the size; what exceeds it is cut evenly."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    return torch.stack([_pixels(picture, height, width) for picture in pictures])


def to_mask(masks: Image.Image | Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Masks [B, 1, height, width] in 0..1 of pictures, fitted as `to_pixels` does: white 1, black or transparent 0."""
    if isinstance(masks, Image.Image):
        masks = [masks]
    return torch.stack([_pixels(_luminance(mask), height, width)[:1] for mask in masks])


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


def open_picture(path: Path) -> Image.Image:
    """A picture file, read whole. Raises OSError that names the file where it is missing or no picture."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is no picture that can be read") from error
    return picture


def read_metadata(path: Path) -> dict:
    """The settings that `write_png` put into a file. Raises ValueError where there are none."""
    text = getattr(open_picture(path), "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(
            f"{path} does not say how it was drawn: expected a PNG that `python -m sana_core generate` wrote, with its "
            f"settings in a {METADATA_KEY!r} chunk. Programs that edit pictures drop it"
        )
    return json.loads(text)


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder by name: PNG, JPEG, WebP. Raises FileNotFoundError where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one with pictures in it")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no picture: expected files ending in {', '.join(PICTURE_SUFFIXES)}")
    return paths


def _luminance(mask: Image.Image) -> Image.Image:
    if not mask.has_transparency_data:
        return mask.convert("L")
    return Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA")).convert("L")


def _pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    bytes_ = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return rearrange(bytes_.float() / 255, "(h w c) -> c h w", h=height, w=width)
