import pytest

from sana_core.resolution import ASPECT_RATIOS, INFERENCE_ASPECT_RATIOS, Size, check_size, nearest_size


@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 4096])
def test_every_size_fits_the_autoencoder_and_its_key(base):
    for ratio, size in ASPECT_RATIOS[base].items():
        check_size(size.height, size.width)
        assert ratio == pytest.approx(size.height / size.width, abs=0.011)
        assert 0.9 <= size.height * size.width / base**2 <= 1.05
    assert ASPECT_RATIOS[base][1.0] == Size(base, base)


@pytest.mark.parametrize("base, factor", [(512, 0.5), (2048, 2), (4096, 4)])
def test_tables_are_multiples_of_the_1024_table(base, factor):
    assert ASPECT_RATIOS[base].keys() == ASPECT_RATIOS[1024].keys()
    for ratio, size in ASPECT_RATIOS[base].items():
        reference = ASPECT_RATIOS[1024][ratio]
        assert (size.height, size.width) == (reference.height * factor, reference.width * factor)


def test_official_counts():
    assert [len(ASPECT_RATIOS[base]) for base in (256, 512, 1024, 2048, 4096)] == [9, 40, 40, 40, 40]
    assert [len(INFERENCE_ASPECT_RATIOS[base]) for base in (512, 1024, 2048, 4096)] == [33, 33, 40, 40]
    assert set(ASPECT_RATIOS[1024]) - set(INFERENCE_ASPECT_RATIOS[1024]) == {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}


@pytest.mark.parametrize(
    "height, width, base, expected",
    [
        (1024, 1024, 1024, Size(1024, 1024)),
        (1080, 1920, 1024, Size(768, 1344)),
        (1920, 1080, 1024, Size(1344, 768)),
        (3000, 2000, 1024, Size(1216, 832)),
        (100, 10_000, 1024, Size(512, 2048)),
        (1080, 1920, 512, Size(384, 672)),
        (2160, 3840, 4096, Size(3072, 5376)),
        (9, 16, 256, Size(192, 352)),
    ],
)
def test_nearest_size(height, width, base, expected):
    assert nearest_size(height, width, INFERENCE_ASPECT_RATIOS[base]) == expected


def test_nearest_size_depends_on_the_table():
    assert nearest_size(512, 1984, ASPECT_RATIOS[1024]) == Size(512, 1984)
    assert nearest_size(512, 1984, INFERENCE_ASPECT_RATIOS[1024]) == Size(512, 2048)


def test_size_without_area_is_refused():
    with pytest.raises(ValueError, match="0x512"):
        nearest_size(512, 0, ASPECT_RATIOS[512])


@pytest.mark.parametrize(
    "height, width, nearest",
    [
        (1000, 1024, "1024x992 or 1024x1024"),
        (512, 500, "480x512 or 512x512"),
        (777, 555, "544x768 or 576x800"),
        (16, 64, "64x32$"),
        (0, 64, "64x32$"),
    ],
)
def test_bad_size_names_the_nearest(height, width, nearest):
    with pytest.raises(ValueError, match=f"{width}x{height}.*multiples of 32.*nearest sizes are {nearest}"):
        check_size(height, width)


def test_good_sizes_pass():
    check_size(32, 4096)
    check_size(256, 64, multiple=64)
