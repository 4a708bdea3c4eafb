"""Samplers and schedules see what the official code would show them."""

from types import SimpleNamespace

import pytest
import torch

from sana_core.sampler.schedule import get_sigmas_flow, get_sigmas_flow_euler


@pytest.fixture
def sampling(part):
    return part("nodes.sampling")


@pytest.fixture
def model(part, tiny_models):
    return part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")


def scheduled(sampling, model, **inputs):
    return sampling.SanaScheduler.execute(model, **inputs).result[0]


def test_sigmas_are_the_official_ones(sampling, model):
    assert torch.equal(scheduled(sampling, model, steps=20), get_sigmas_flow(20, 3.0))
    assert torch.equal(scheduled(sampling, model, steps=20, shift=6.0), get_sigmas_flow(20, 6.0))
    euler = scheduled(sampling, model, steps=20, schedule="flow_euler")
    assert torch.equal(euler, get_sigmas_flow_euler(20, 3.0))


def test_partial_denoising_takes_the_end_of_a_longer_schedule(sampling, model):
    sigmas = scheduled(sampling, model, steps=5, denoise=0.5)
    assert torch.equal(sigmas, get_sigmas_flow(10, 3.0)[-6:])
    assert len(scheduled(sampling, model, steps=5, denoise=0.0)) == 0


def test_the_shift_of_a_patch_counts(sampling, model):
    import comfy_extras.nodes_model_advanced as nodes_model_advanced

    (patched,) = nodes_model_advanced.ModelSamplingSD3().patch(model, 5.0)
    assert torch.equal(scheduled(sampling, patched, steps=4), get_sigmas_flow(4, 5.0))


def test_a_model_without_flow_shift_is_refused(sampling):
    other = SimpleNamespace(get_model_object=lambda name: object())
    with pytest.raises(ValueError, match="no flow shift.*object"):
        scheduled(sampling, other, steps=4)
    assert len(scheduled(sampling, other, steps=4, shift=3.0)) == 5


class Denoiser:
    """What KSAMPLER hands to a sampler function, recording what it is asked for."""

    def __init__(self, latent_image):
        self.latent_image = latent_image
        self.x, self.options = [], []

    def __call__(self, x, sigma, model_options, seed):
        self.x.append(x)
        self.options.append(model_options["transformer_options"])
        return torch.zeros_like(x)


def run(sampling, name, latent, sigmas):
    denoiser = Denoiser(latent)
    noise = torch.ones(1, 32, 2, 2)
    x = sigmas[0] * noise + (1 - sigmas[0]) * latent  # as ComfyUI scales it
    options = {"model_options": {"transformer_options": {"kept": 1}}, "seed": 0}
    sampling.flow_sampler(name).sampler_function(denoiser, x, sigmas, extra_args=options, disable=True)
    assert options["model_options"]["transformer_options"] == {"kept": 1}, "the caller's options must not change"
    return denoiser


@pytest.mark.parametrize("name, floors", [("flow_dpm-solver", True), ("flow_euler", False)])
def test_whole_timesteps_for_the_official_solver(sampling, part, name, floors):
    denoiser = run(sampling, name, torch.zeros(1, 32, 2, 2), get_sigmas_flow(3, 3.0))
    key = part("nodes.adapter").FLOOR_TIMESTEPS
    assert [options.get(key, False) for options in denoiser.options] == [floors] * 3
    assert all(options["kept"] == 1 for options in denoiser.options)


def test_noise_is_not_scaled_by_the_first_sigma(sampling):
    latent = torch.zeros(1, 32, 2, 2)
    assert torch.allclose(
        run(sampling, "flow_dpm-solver", latent, get_sigmas_flow(3, 3.0)).x[0], torch.ones(1), atol=1e-7
    )


def test_image_to_image_keeps_its_mix(sampling):
    sigmas = get_sigmas_flow(6, 3.0)[-4:]
    image = run(sampling, "flow_dpm-solver", torch.full((1, 32, 2, 2), 2.0), sigmas).x[0]
    assert torch.allclose(image, sigmas[0] + (1 - sigmas[0]) * 2)
    partial = run(sampling, "flow_dpm-solver", torch.zeros(1, 32, 2, 2), sigmas).x[0]
    assert torch.allclose(partial, sigmas[0].expand(1))
