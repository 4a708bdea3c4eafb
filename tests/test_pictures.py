import torch
from PIL import Image

from sana_core.pictures import to_mask, to_pixels


def test_pictures_fill_the_size_and_keep_their_shape():
    picture = Image.new("RGB", (100, 300), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 100, 100, 200))
    pixels = to_pixels(picture.convert("RGBA"), 32, 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0, 2].min() > 0.9, "the blue square in the middle is what a square cut out of it shows"
    turned = Image.new("L", (64, 32))
    turned.getexif()[0x0112] = 6  # taken with the camera turned
    assert to_pixels([turned, turned], 64, 32).shape == (2, 3, 64, 32)


def test_a_mask_is_white_where_it_counts():
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.paste(64, (16, 0, 32, 32))
    (values,) = to_mask(mask, 32, 64)[0]
    assert (values[:, :14] == 1).all() and (values[:, 34:] == 0).all()
    torch.testing.assert_close(values[:, 20:28], torch.full((32, 8), 64 / 255))
    assert to_mask([mask, mask.convert("1")], 32, 64).shape == (2, 1, 32, 64)


def test_what_is_transparent_in_a_mask_does_not_count():
    mask = Image.new("RGBA", (64, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 32))
    (values,) = to_mask(mask, 32, 64)[0]
    assert (values[:, :30] == 1).all() and (values[:, 34:] == 0).all()
