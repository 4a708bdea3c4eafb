"""Resampling without its large intermediates, against the formulas that make them."""

import pytest
import torch
import torch.nn.functional as F

from sana_core.models.convolution import ConvLayer, RMSNorm2d, SiLU
from sana_core.models.dc_ae import EfficientViTBlock, ResBlock
from sana_core.models.resampling import (
    Downsample,
    InterpolateConv,
    Upsample,
    add_duplicated_in_space,
    average_channels,
    average_space_to_depth,
    depth_to_space,
    duplicate_channels,
)
from tests.models.test_dc_ae import narrow, random_dc_ae


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def enlarged(module, x):
    """The convolution of the enlarged input, as it was published."""
    return module.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_sub_pixel_form_is_the_convolution_of_the_enlarged_input(size):
    module = InterpolateConv(6, 5).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), enlarged(module, x), rtol=0, atol=1e-14)


def test_sub_pixel_form_has_the_same_gradients():
    module = InterpolateConv(6, 5).double()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    weights = torch.randn(2, 5, 8, 6, dtype=torch.float64)
    ours = torch.autograd.grad((module(x) * weights).sum(), inputs)
    theirs = torch.autograd.grad((enlarged(module, x) * weights).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


def test_a_changed_weight_is_seen_at_once():
    module, x = InterpolateConv(6, 5), torch.randn(1, 6, 4, 4)
    with torch.no_grad():
        module(x)
        module.conv.conv.weight.mul_(2)
        torch.testing.assert_close(module(x), enlarged(module, x))


def test_bfloat16_rounds_the_summed_weights_once_more(monkeypatch):
    """Which adds as much to one convolution's error as rounding its result does, and little to a whole decoder's."""
    config = narrow("dc-ae-f32c32-sana-1.1")
    model = random_dc_ae(config).bfloat16()
    latent = torch.randn(1, config.latent_channels, 3, 3).bfloat16()
    with torch.no_grad():
        ours = model.decode(latent)
        monkeypatch.setattr(InterpolateConv, "forward", enlarged)
        theirs = model.decode(latent)
        truth = model.float().decode(latent.float())
    assert not torch.equal(ours, theirs)
    assert (ours - truth).square().mean() < 1.25 * (theirs - truth).square().mean()


@pytest.mark.parametrize("channels, made", [(8, 4), (8, 8), (8, 2), (4, 8)])
def test_shortcuts_are_the_published_ones(channels, made):
    x = torch.randn(2, channels, 4, 6)
    fresh = torch.randn(2, made, 8, 12)
    expected = fresh + F.pixel_shuffle(duplicate_channels(x, 4 * made), 2)
    assert torch.equal(add_duplicated_in_space(fresh, x), expected)
    down = average_channels(F.pixel_unshuffle(x, 2), made)
    torch.testing.assert_close(average_space_to_depth(x, made), down, rtol=1e-6, atol=1e-6)


def test_depth_to_space_is_pixel_shuffle():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(depth_to_space(x), F.pixel_shuffle(x, 2))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norm_is_pytorchs(dtype, tolerance):
    norm = RMSNorm2d(8).to(dtype)
    x, residual = torch.randn(2, 8, 3, 4, dtype=dtype), torch.randn(2, 8, 3, 4, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        expected = F.rms_norm(x.movedim(1, -1), (8,), norm.weight, 1e-5) + norm.bias
        expected = expected.movedim(-1, 1) + residual
        torch.testing.assert_close(norm(x, residual), expected, rtol=tolerance, atol=10 * tolerance)
        assert norm(x, overwrite=True).dtype == dtype


@pytest.mark.parametrize(
    "module",
    [
        ResBlock(32),
        ResBlock(32, batch_norm=True),
        EfficientViTBlock(32, multiscale=True),
        Upsample(32, 16, "interpolate"),
        Upsample(32, 32, "pixel_shuffle"),
        Downsample(32, 64, "conv"),
        ConvLayer(32, 32, norm=RMSNorm2d(32), act=SiLU()),
        RMSNorm2d(32),
    ],
    ids=lambda module: type(module).__name__,
)
def test_results_are_overwritten_but_never_what_is_given(module):
    """And with gradients, which forbid it, nothing else comes out."""
    module.eval()
    x = torch.randn(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        plain = module(x)
    assert torch.equal(x, kept)
    tracked = module(x.requires_grad_())
    torch.testing.assert_close(tracked, plain, rtol=1e-5, atol=1e-5)
    tracked.sum().backward()
    assert x.grad.isfinite().all()
