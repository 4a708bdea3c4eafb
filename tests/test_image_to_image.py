"""Image to image and inpainting with flow models in the pipeline; Sprint's is in test_sprint.py."""

import logging

import pytest
import torch
from PIL import Image

from sana_core import SanaPipeline
from sana_core.autoencoder import encode_pixels
from sana_core.pictures import to_pixels
from sana_core.sampler.flow import SAMPLERS
from sana_core.sampler.schedule import get_sigmas_flow
from sana_core.sampling import prepare_noise
from tests import tiny

PROMPT = "a red cat"
SIZE = {"height": 64, "width": 96}
SHAPE = (1, 32, 2, 3)


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture
def picture():
    pixels = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(5))
    return Image.fromarray((pixels * 255).byte().numpy())


@pytest.fixture
def left(picture):
    """White on the left third, which is one column of latents."""
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 32, 64))
    return mask


def latents_of(pipe, picture):
    with torch.no_grad():
        return encode_pixels(pipe.vae, to_pixels(picture, 64, 96))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength, left_steps", [(0.5, 4), (0.3, 3), (1.0, 8)])
def test_strength_is_the_share_of_the_steps(pipe, picture, sampler, strength, left_steps):
    """What diffusers' image to image does: the last steps of the whole schedule, from the image at their noise."""
    states, options = [], {"num_inference_steps": 8, "sampler": sampler, "seed": 3, "output_type": "latent"}
    pipe(PROMPT, image=picture, strength=strength, callback=states.append, **SIZE, **options)
    assert len(states) == left_steps
    sigma = states[0]["sigma"].item()
    expected = (1 - sigma) * latents_of(pipe, picture) + sigma * prepare_noise(SHAPE, 3)
    torch.testing.assert_close(states[0]["x"], expected, atol=1e-5, rtol=1e-5)
    if sampler == "flow_dpm-solver":
        assert sigma == get_sigmas_flow(8, pipe.shift)[8 - left_steps].item()


def test_an_image_counts_half_if_nothing_is_said(pipe, picture):
    options = {**SIZE, "seed": 3, "num_inference_steps": 4, "output_type": "latent", "image": picture}
    assert torch.equal(pipe(PROMPT, **options), pipe(PROMPT, strength=0.5, **options))


def test_the_mask_keeps_latents_and_pixels(pipe, picture, left):
    options = {**SIZE, "seed": 3, "num_inference_steps": 4, "image": picture, "mask": left}
    latents = pipe(PROMPT, output_type="latent", **options)
    known = latents_of(pipe, picture)
    assert torch.equal(latents[..., 1:], known[..., 1:])
    assert not torch.isclose(latents[..., 0], known[..., 0], atol=0.05).any(0).all()
    (drawn,) = pipe(PROMPT, **options)
    kept = (32, 0, 96, 64)
    assert drawn.crop(kept).tobytes() == picture.crop(kept).tobytes()
    assert drawn.crop((0, 0, 32, 64)).tobytes() != picture.crop((0, 0, 32, 64)).tobytes()
    assert torch.equal(latents, pipe(PROMPT, output_type="latent", strength=1.0, **options)), "all of it, by default"


def test_grey_mixes_and_a_small_mask_is_not_lost(pipe, picture):
    pixels, mask = to_pixels(picture, 64, 96), torch.zeros(1, 1, 64, 96)
    mask[..., 10, 20], mask[..., 40, 50] = 1.0, 0.25
    options = {**SIZE, "seed": 3, "num_inference_steps": 2, "image": pixels, "mask": mask, "output_type": "pt"}
    drawn = pipe(PROMPT, **options)
    changed = (drawn != pixels).any(dim=1, keepdim=True)
    assert changed.nonzero().tolist() == [[0, 0, 10, 20], [0, 0, 40, 50]]
    whole = pipe.decode(pipe(PROMPT, **{**options, "output_type": "latent"}))
    expected = 0.25 * whole[0, :, 40, 50] + 0.75 * pixels[0, :, 40, 50]
    torch.testing.assert_close(drawn[0, :, 40, 50], expected)


def test_sprint_inpaints_too(picture, left):
    pipe = SanaPipeline(tiny.sprint(), tiny.dc_ae(), tiny.text_encoder())
    latents = pipe(PROMPT, image=picture, mask=left, seed=3, output_type="latent", **SIZE)
    assert torch.equal(latents[..., 1:], latents_of(pipe, picture)[..., 1:])


def test_each_prompt_may_have_its_own_image_and_mask(pipe, picture, left):
    upside_down = picture.transpose(Image.Transpose.ROTATE_180)
    options = {**SIZE, "num_inference_steps": 3, "output_type": "latent"}
    noise = prepare_noise((2, *SHAPE[1:]), 1)
    images, masks = [picture, upside_down], [left, left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    both = pipe([PROMPT, "a bird"], image=images, mask=masks, latents=noise, **options)
    for row, (prompt, image, mask) in enumerate(zip([PROMPT, "a bird"], images, masks, strict=True)):
        alone = pipe(prompt, image=image, mask=mask, latents=noise[row : row + 1], **options)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 0.5}, "strength given without an image"),
        ({"mask": torch.ones(1, 1, 64, 96)}, "mask or strength given without an image"),
        ({"image": torch.zeros(1, 3, 64, 96), "strength": 1.5}, "strength is 1.5, expected above 0"),
        ({"image": torch.zeros(1, 3, 64, 96), "strength": 0.0}, "strength is 0.0, expected above 0"),
        ({"image": torch.zeros(1, 3, 64, 64)}, r"image has shape \(1, 3, 64, 64\), expected \(1, 3, 64, 96\) or"),
        ({"image": torch.zeros(*SHAPE), "mask": torch.ones(1, 64, 96)}, r"mask has shape \(1, 64, 96\), expected"),
        ({"image": torch.zeros(*SHAPE), "mask": torch.full((1, 1, 64, 96), 255.0)}, "the mask goes from 255 to 255"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **SIZE, **arguments)


def test_a_broken_mask_is_reported(pipe):
    with pytest.raises(FloatingPointError, match="made the mask"):
        pipe(PROMPT, image=torch.zeros(SHAPE), mask=torch.full((1, 1, 64, 96), torch.nan), **SIZE)


def test_a_strength_that_leaves_nothing_of_the_image_is_said(pipe, picture, caplog):
    options = {**SIZE, "image": picture, "num_inference_steps": 1, "seed": 1}
    with caplog.at_level(logging.WARNING):
        pipe(PROMPT, strength=0.9, **options)
    assert "strength of 0.9 leaves all 1 steps" in caplog.text
