"""Sizes: only those on the autoencoder's grid."""

import pytest
import torch

from sana_core.resolution import ASPECT_RATIOS, INFERENCE_ASPECT_RATIOS


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


@pytest.mark.parametrize(
    "base_size, ratio, expected",
    [("1024px", "1.00", (1024, 1024)), ("512px", "0.57", (384, 672)), ("2K", "1.75", (2688, 1536))]
    + [("SanaMS_1600M_P1_D20_4K", "0.25", (2048, 8192)), ("SanaMS_600M_P1_D28", "0.26", (512, 1984))],
)
def test_resolution_reads_the_values_of_old_graphs(latent, base_size, ratio, expected):
    """The ratios of ComfyUI_ExtraModels are width / height, and it lists the sizes for training too."""
    assert latent.SanaResolution.validate_inputs(base_size, ratio) is True
    assert tuple(latent.SanaResolution.execute(base_size, ratio).result) == expected


@pytest.mark.parametrize("base", [512, 1024, 2048, 4096])
def test_old_ratios_are_the_official_sizes_turned_over(latent, base):
    for ratio, size in ASPECT_RATIOS[base].items():
        assert tuple(latent.SanaResolution.execute(str(base), f"{ratio:.2f}").result) == (size.height, size.width)


@pytest.mark.parametrize("values", [("1000", "1.00"), ("1024", "1.01"), ("", "")])
def test_resolution_refuses_what_no_table_has(latent, values):
    assert "expected one of" in latent.SanaResolution.validate_inputs(*values)
