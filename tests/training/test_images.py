"""Pictures as files have them, and as training sees them."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from sana_core.resolution import Size
from sana_core.training.images import ImageError, fit_to_bucket, is_animated, read_image, read_size
from tests.training.pictures import encoded, picture

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def colours(image):
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def png_16_bit_rgb(values):
    """A PNG of one row with 16 bits a channel, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"".join(struct.pack(">3H", *value) for value in values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


# What each orientation does to a picture whose upper left pixel is red: where red is once it is upright.
@pytest.mark.parametrize(
    "orientation, size, red_at",
    [
        (1, (3, 2), (0, 0)),
        (2, (3, 2), (2, 0)),
        (3, (3, 2), (2, 1)),
        (4, (3, 2), (0, 1)),
        (5, (2, 3), (0, 0)),
        (6, (2, 3), (1, 0)),
        (7, (2, 3), (1, 2)),
        (8, (2, 3), (0, 2)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, orientation, size, red_at):
    image = Image.new("RGB", (3, 2), GREEN)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = read_image(content)
    assert upright.size == size
    assert upright.getpixel(red_at) == RED
    assert colours(upright).count(RED) == 1
    assert read_size(content) == Size(size[1], size[0])


def test_what_is_under_transparency_stays_hidden():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (255, 0, 0, 102))  # 0.4 of red over white: 255, 153, 153
    assert colours(read_image(encoded(image))) == [WHITE, RED, (255, 153, 153)]


def test_grey_with_transparency():
    image = Image.new("LA", (2, 1), (7, 0))
    image.putpixel((1, 0), (7, 255))
    assert colours(read_image(encoded(image))) == [WHITE, (7, 7, 7)]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert colours(read_image(encoded(image, kind))) == [RED, GREEN]
    assert colours(read_image(encoded(image, kind, transparency=0))) == [WHITE, GREEN]


def test_a_transparent_colour_of_an_rgb_png():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    assert colours(read_image(encoded(image, transparency=RED))) == [WHITE, GREEN]


def test_black_and_white():
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    assert colours(read_image(encoded(image))) == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    assert [colour[0] for colour in colours(read_image(encoded(image, kind)))] == [0, 1, 128, 255]  # v / 257, rounded


def test_16_bit_rgb():
    content = png_16_bit_rgb([(0, 257, 65535), (32896, 514, 0)])
    assert colours(read_image(content)) == [(0, 1, 255), (128, 2, 0)]


def test_float_grey():
    image = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert [colour[0] for colour in colours(read_image(encoded(image, "TIFF")))] == [0, 128, 255]


@pytest.mark.parametrize("values", [[0.0, 2.0], [-1.0, 0.0], [0.0, float("nan")]])
def test_float_grey_of_unknown_range_is_refused(values):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with pytest.raises(ImageError, match="grey values go from"):
        read_image(encoded(image, "TIFF"))


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red, green, blue = read_image(encoded(image, "JPEG")).getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert is_animated(content)
    assert not is_animated(encoded(first, kind))
    assert set(colours(read_image(content))) == {RED}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "half.png"
    content = encoded(picture(256, 256), kind)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"half\.png: it is damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"version https://git-lfs", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused_by_name(content, tmp_path):
    path = tmp_path / "bad name ü.png"
    path.write_bytes(content)
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match="bad name ü.png: it is "):
            read(path)
    with pytest.raises(ImageError, match="in the tar: it is "):
        read_image(content, "in the tar")


def test_flipped_bytes_in_a_png_are_found():
    content = bytearray(encoded(picture(128, 128)))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="damaged"):
        read_image(bytes(content), "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: there is no such file"):
        read_image(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="bomb: it is too large"):
        read_image(encoded(picture(64, 64)), "bomb")


@pytest.mark.parametrize("size", [(100, 80), (64, 64), (63, 200), (500, 300), (1, 1)])
@pytest.mark.parametrize("bucket", [Size(64, 96), Size(96, 64), Size(32, 32)])
def test_fitting_is_torchvisions_resize_and_crop(size, bucket):
    image = picture(*size, seed=size[0])
    width, height = size
    if bucket.height / height > bucket.width / width:  # as NVlabs/Sana `sana_data_multi_scale.py` has it
        resize = bucket.height, int(width * bucket.height / height)
    else:
        resize = int(height * bucket.width / width), bucket.width
    official = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((bucket.height, bucket.width)),
            transforms.ToTensor(),
        ]
    )
    assert torch.equal(fit_to_bucket(image, bucket.height, bucket.width), official(image))


@pytest.mark.parametrize("side, resampling", [(1024, "BICUBIC"), (2048, "LANCZOS")])
def test_lanczos_from_2048_pixels_on(side, resampling):
    image = picture(300, 300)
    expected = np.asarray(image.resize((side, side), Image.Resampling[resampling]))
    pixels = (fit_to_bucket(image, side, side) * 255).round().byte()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_an_orientation_behind_the_picture_counts_too():
    """Where ExifTool puts it; Pillow writes it ahead of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(64, 32), exif=exif)
    chunk = content.index(b"eXIf") - 4
    end = chunk + 12 + int.from_bytes(content[chunk : chunk + 4], "big")
    last = content.index(b"IEND") - 4
    moved = content[:chunk] + content[end:last] + content[chunk:end] + content[last:]
    assert moved != content and len(moved) == len(content)
    assert read_size(moved) == read_size(content) == Size(64, 32)
    assert read_image(moved).size == (32, 64)


def test_the_size_of_a_png_is_read_without_decoding_it():
    content = encoded(picture(300, 200))
    assert read_size(content[:200]) == Size(200, 300)
