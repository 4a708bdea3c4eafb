"""Aspect buckets: the size of the official table that a picture is trained at, so that a batch has one shape.

Source: NVlabs/Sana `diffusion/data/transforms.py` (the nearest ratio) and `sana_data_multi_scale.py` (the resize).
"""

from ..resolution import ASPECT_RATIOS, Size, nearest_size


def check_base(base: int) -> None:
    """Raise ValueError unless there is a table for this base size in pixels."""
    if base not in ASPECT_RATIOS:
        known = ", ".join(map(str, ASPECT_RATIOS))
        raise ValueError(f"there is no table of aspect ratios for {base} px, choose one of {known}")


def choose_bucket(height: int, width: int, base: int) -> Size:
    """The size whose ratio height / width is nearest to the upright picture's."""
    return nearest_size(height, width, ASPECT_RATIOS[base])


def cover_size(height: int, width: int, bucket: Size) -> Size:
    """The picture's size after the resize that just covers the bucket; the official code rounds down."""
    if bucket.height / height > bucket.width / width:
        return Size(bucket.height, max(int(width * bucket.height / height), bucket.width))
    return Size(max(int(height * bucket.width / width), bucket.height), bucket.width)


def cropped_share(height: int, width: int, bucket: Size) -> float:
    """Share of the picture's area, in 0..1, that the centre crop to the bucket cuts off."""
    cover = cover_size(height, width, bucket)
    return 1 - bucket.height * bucket.width / (cover.height * cover.width)
