"""Sizes: only those on the autoencoder's grid."""

import pytest
import torch

from sana_core.resolution import INFERENCE_ASPECT_RATIOS


@pytest.fixture
def latent(part):
    return part("nodes.latent")


def test_empty_latent(latent):
    (made,) = latent.SanaEmptyLatent.execute(1344, 768, 2).result
    assert made["samples"].shape == (2, 32, 24, 42)
    assert torch.count_nonzero(made["samples"]) == 0
    assert made["downscale_ratio_spacial"] == 32


@pytest.mark.parametrize("width, height", [(1000, 1024), (1024, 1000), (16, 32)])
def test_sizes_off_the_grid_are_refused(latent, width, height):
    with pytest.raises(ValueError, match="nearest sizes"):
        latent.SanaEmptyLatent.execute(width, height, 1)


@pytest.mark.parametrize("base", INFERENCE_ASPECT_RATIOS)
def test_resolution_gives_official_sizes(latent, base):
    combo = {entry.id: entry for entry in latent.SanaResolution.define_schema().inputs}["aspect_ratio"]
    assert combo.default in combo.options
    sizes = {tuple(latent.SanaResolution.execute(str(base), option).result) for option in combo.options}
    assert sizes <= {(size.width, size.height) for size in INFERENCE_ASPECT_RATIOS[base].values()}
    assert (base, base) in sizes
    if base in (512, 1024):
        assert len(sizes) == len(INFERENCE_ASPECT_RATIOS[base])


def test_the_label_names_the_size_at_1024(latent):
    assert tuple(latent.SanaResolution.execute("1024", "7:4 (1344x768)").result) == (1344, 768)
    assert tuple(latent.SanaResolution.execute("2048", "4:7 (768x1344)").result) == (1536, 2688)
