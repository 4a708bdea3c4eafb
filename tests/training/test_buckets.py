"""The bucket of a picture, by hand."""

import pytest

from sana_core.resolution import ASPECT_RATIOS, Size
from sana_core.training.buckets import check_base, choose_bucket, cover_size, cropped_share


@pytest.mark.parametrize(
    "height, width, base, bucket",
    [
        (1000, 1000, 1024, Size(1024, 1024)),
        (1080, 1920, 1024, Size(768, 1344)),  # 0.5625: 0.57 is 0.0075 away, 0.52 is 0.0425
        (1920, 1080, 1024, Size(1344, 768)),  # 1.7778: 1.75
        (3000, 2000, 512, Size(608, 416)),  # 1.5: 1.46 is 0.04 away, 1.67 is 0.17
        (100, 1000, 512, Size(256, 1024)),  # 0.1: the widest there is
        (1000, 100, 2048, Size(4096, 1024)),  # 10: the tallest
        (600, 800, 256, Size(224, 288)),  # 0.75: 0.78 of the own table
        (2, 3, 4096, Size(3328, 4864)),  # 0.6667: 0.68
    ],
)
def test_the_nearest_ratio(height, width, base, bucket):
    assert choose_bucket(height, width, base) == bucket


@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 4096])
def test_a_picture_of_a_buckets_size_goes_there_uncropped(base):
    for bucket in ASPECT_RATIOS[base].values():
        assert choose_bucket(bucket.height, bucket.width, base) == bucket
        assert cropped_share(bucket.height, bucket.width, bucket) == 0


def test_cover_rounds_down_as_upstream_does():
    assert cover_size(1080, 1920, Size(768, 1344)) == Size(768, 1365)  # 1920 * 768 / 1080 = 1365.33
    assert cover_size(1000, 1000, Size(704, 1408)) == Size(1408, 1408)


def test_cover_never_falls_short():
    for height in range(1, 400, 7):
        for width in range(1, 400, 11):
            bucket = choose_bucket(height, width, 256)
            cover = cover_size(height, width, bucket)
            assert cover.height >= bucket.height and cover.width >= bucket.width
            assert cover.height == bucket.height or cover.width == bucket.width


def test_cropped_share():
    assert cropped_share(1000, 1000, Size(704, 1408)) == pytest.approx(0.5)
    assert cropped_share(100, 1000, Size(256, 1024)) == pytest.approx(1 - 1024 / 2560)


def test_an_unknown_base_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no table of aspect ratios for 768 px, choose one of 256, 512, 1024"):
        check_base(768)
