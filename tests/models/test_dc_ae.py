"""The autoencoder against diffusers' AutoencoderDC, with the same random weights carried over as files."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC

from sana_core.checkpoint import save_dc_ae
from sana_core.config import AUTOENCODERS
from sana_core.kernels import REFERENCE
from sana_core.models.convolution import RMSNorm2d
from sana_core.models.dc_ae import DCAE
from tests import tiny

PUBLISHED = [name for name in AUTOENCODERS if name != "dc-ae-nano"]


def narrow(name):
    """The preset at an eighth of its width; 32-wide heads leave 32 channels at least."""
    config = AUTOENCODERS[name]
    channels = tuple(max(32, width // 8) for width in config.encoder_channels)
    return replace(config, encoder_channels=channels, decoder_channels=channels, latent_channels=32)


def random_dc_ae(config):
    """An autoencoder with every weight and statistic random, norms included."""
    generator = torch.Generator().manual_seed(0)
    model = DCAE(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def assert_close(ours, theirs, tolerance):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


def compare(config, folder, size, tolerance):
    model = random_dc_ae(config)
    save_dc_ae(model, folder, layout="diffusers")
    reference = AutoencoderDC.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    with torch.no_grad():
        latent = reference.encode(pixels).latent
        assert_close(model.encode(pixels), latent, tolerance)
        assert_close(model.decode(latent), reference.decode(latent).sample, tolerance)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_directions_agree_with_diffusers(name, tmp_path):
    compression = AUTOENCODERS[name].spatial_compression
    compare(narrow(name), tmp_path, (6 * compression, 7 * compression), 2e-6)


def test_few_positions_agree_with_diffusers(tmp_path):
    """Below 33 positions diffusers multiplies in the other order."""
    compare(narrow("dc-ae-f32c32-sana-1.1"), tmp_path, (64, 64), 2e-6)


@pytest.mark.slow
def test_full_size_agrees_with_diffusers(tmp_path):
    compare(AUTOENCODERS["dc-ae-f32c32-sana-1.1"], tmp_path, (96, 64), 5e-6)


def test_sides_that_do_not_fit_are_refused():
    model = DCAE(narrow("dc-ae-f32c32-sana-1.1"))
    with pytest.raises(ValueError, match="multiples of 32, got 100 x 64 pixels"):
        model.encode(torch.zeros(1, 3, 64, 100))


def test_batch_equals_one_by_one():
    model = random_dc_ae(narrow("dc-ae-f32c32-sana-1.1"))
    latents = torch.randn(2, 32, 3, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together, first = model.decode(latents), model.decode(latents[:1])
    assert_close(together[:1], first, 1e-6)


def test_every_norm_computes_with_the_kernels_that_are_given():
    """And takes its residual along, where gradients are wanted; the result is that of the plain path."""
    seen = []

    def rms_norm(x, weight, bias, residual, eps):
        seen.append(residual is not None)
        return REFERENCE.rms_norm(x, weight, bias, residual, eps)

    plain, model = tiny.dc_ae(), DCAE(tiny.DC_AE, kernels=replace(REFERENCE, rms_norm=rms_norm))
    model.load_state_dict(plain.state_dict())
    latent = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(2))
    out = model.decode(latent)
    norms = [module for module in model.decoder.modules() if isinstance(module, RMSNorm2d)]
    assert len(seen) == len(norms) > 3 and any(seen) and not all(seen)
    with torch.no_grad():
        expected = plain.decode(latent)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
