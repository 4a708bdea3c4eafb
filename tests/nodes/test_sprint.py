"""The Sprint sampler node draws what the pipeline draws, and says what it cannot do."""

import logging
from types import SimpleNamespace

import pytest
import torch

from sana_core import SanaPipeline
from tests import tiny

PROMPTS = ["a red cat on the left of a blue background", "two green birds sleep under a warm yellow sun"]
SCALE = 0.41407


@pytest.fixture(scope="module")
def pipeline():
    return SanaPipeline(tiny.sprint(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture(scope="module")
def sprint(part):
    return part("nodes.sprint")


@pytest.fixture(scope="module")
def model(part, tiny_models):
    return part("nodes.adapter").load_model(
        tiny_models / "diffusion_models" / "sprint.safetensors", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def captions(pipeline):
    return pipeline.text_encoder.encode(PROMPTS)


@pytest.fixture(scope="module")
def positive(captions):
    embeds, mask = captions
    return [[embeds, {"attention_mask": mask}]]


@pytest.fixture
def picture():
    """An unscaled latent, as the autoencoder gives it."""
    return {"samples": 2 * torch.randn(2, 32, 2, 3, generator=torch.Generator().manual_seed(4))}


def empty(batch=2):
    return {"samples": torch.zeros(batch, 32, 2, 3), "downscale_ratio_spacial": 32}


def sample(sprint, model, positive, latent, seed=5, **options):
    return sprint.SanaSprintSampler.execute(model, positive, latent, seed, **options).result[0]


def expected(pipeline, captions, **options):
    embeds, mask = captions
    options |= {"height": 64, "width": 96, "seed": 5, "output_type": "latent"}
    return pipeline(prompt_embeds=embeds, prompt_mask=mask, **options) / SCALE


def assert_close(actual, other):
    assert actual.shape == other.shape
    error = (actual - other).abs().max() / other.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_is_the_pipelines_picture(sprint, model, positive, pipeline, captions, steps):
    drawn = sample(sprint, model, positive, empty(), steps=steps)
    assert set(drawn) == {"samples"}, "the size has been acted upon"
    assert_close(drawn["samples"], expected(pipeline, captions, num_inference_steps=steps))


def test_guidance_and_own_timesteps(sprint, model, positive, pipeline, captions):
    drawn = sample(sprint, model, positive, empty(), steps=1, guidance=3.3, timesteps="1.2, 0.8,0.3  0")
    other = expected(pipeline, captions, guidance_scale=3.3, timesteps=[1.2, 0.8, 0.3, 0])
    assert_close(drawn["samples"], other)


@pytest.mark.parametrize("steps, denoise", [(2, 0.5), (4, 0.7)])
def test_image_to_image(sprint, model, positive, pipeline, captions, picture, steps, denoise):
    drawn = sample(sprint, model, positive, picture, steps=steps, denoise=denoise)
    options = {"image": SCALE * picture["samples"], "strength": denoise}
    assert_close(drawn["samples"], expected(pipeline, captions, num_inference_steps=steps, **options))


def test_denoise_0_keeps_the_latent(sprint, model, positive, picture):
    assert torch.equal(sample(sprint, model, positive, picture, denoise=0.0)["samples"], picture["samples"])


def test_a_mask_keeps_what_it_leaves_out(sprint, model, positive, picture):
    mask = torch.zeros(1, 1, 2, 3)
    mask[..., 0] = 1
    drawn = sample(sprint, model, positive, picture | {"noise_mask": mask})["samples"]
    torch.testing.assert_close(drawn[..., 1:], picture["samples"][..., 1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn[..., 0], picture["samples"][..., 0], atol=0.1)


def test_one_picture_of_a_batch_can_be_made_again(sprint, model, captions):
    first, second = ([[part[:1], {"attention_mask": mask[:1]}]] for part, mask in (captions, captions))
    both = sample(sprint, model, first, empty())["samples"]
    again = sample(sprint, model, second, empty(1) | {"batch_index": [1]})["samples"]
    torch.testing.assert_close(again, both[1:], atol=1e-4, rtol=1e-4)


def test_a_conditioning_may_start_at_the_start(sprint, model, positive, captions):
    """Sprint's first level is above 1, where core thinks that sampling starts."""
    embeds, options = positive[0]
    ranged = [[embeds, options | {"start_percent": 0.0, "end_percent": 1.0}]]
    expected = sample(sprint, model, positive, empty())["samples"]
    assert torch.equal(sample(sprint, model, ranged, empty())["samples"], expected)


def test_model_sampling_patches_change_nothing(sprint, model, positive):
    import comfy_extras.nodes_model_advanced as nodes_model_advanced

    (patched,) = nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)
    drawn, other = (sample(sprint, each, positive, empty())["samples"] for each in (model, patched))
    torch.testing.assert_close(drawn, other, atol=1e-4, rtol=1e-4)


def test_guidance_of_the_prompt_is_left_alone(sprint, model, positive):
    sample(sprint, model, positive, empty(), steps=1)
    assert positive[0][1].keys() == {"attention_mask"}


def test_a_denoise_that_ignores_the_picture_is_said(sprint, model, positive, picture, caplog):
    with caplog.at_level(logging.WARNING):
        sample(sprint, model, positive, picture, denoise=0.5)
        sample(sprint, model, positive, empty(), denoise=0.6)
        assert "does not count" not in caplog.text
        sample(sprint, model, positive, picture, denoise=0.6)
    assert "strength of 0.6 leaves all 2 steps" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timesteps": "1.5, soon"}, "timesteps are '1.5, soon'; expected numbers"),
        ({"timesteps": "1.5 1.0"}, "fall from at most 1.5708 to 0"),
        ({"steps": 0}, "steps is 0: expected a whole number from 1 to 4"),
    ],
)
def test_bad_input_is_named(sprint, model, positive, options, message):
    with pytest.raises(ValueError, match=message):
        sample(sprint, model, positive, empty(), **options)


def test_other_models_are_refused(sprint, part, tiny_models, positive):
    base = part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")
    with pytest.raises(ValueError, match="needs a Sana-Sprint model, and got another Sana model"):
        sample(sprint, base, positive, empty())
    with pytest.raises(ValueError, match="got a int"):
        sample(sprint, SimpleNamespace(model=3), positive, empty())
