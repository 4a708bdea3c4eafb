"""SCM against diffusers' SCMScheduler, on TrigFlow's formulas as they are published: no network is needed."""

import math

import pytest
import torch
from diffusers import SCMScheduler

from sana_core.sampler.schedule import partial_schedule
from sana_core.sampler.scm import (
    angles_to_sigmas,
    flow_denoiser,
    get_sigmas_scm,
    get_timesteps_scm,
    pure_noise_scale,
    sample_scm,
    starts_from_noise,
)

SIGMA_DATA = 0.5
SHAPE = (2, 4, 3, 5)


def velocity(x, sigma):
    """Nothing in particular, but smooth, not linear in x, and other for every level."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    return torch.tanh(x * (1.5 - sigma)) + 0.3 * torch.sin(5 * sigma + x)


def trigflow_network(x, angle):
    """F of the published formulas: x / sigma_data at an angle, from a velocity network that knows flows only."""
    sigma = angle.sin() / (angle.cos() + angle.sin())
    norm = (sigma**2 + (1 - sigma) ** 2).sqrt()
    scaled = x / SIGMA_DATA * norm
    out = (1 - 2 * sigma) * scaled + (1 - 2 * sigma + 2 * sigma**2) * velocity(scaled, sigma.expand(len(x)))
    return SIGMA_DATA * out / norm


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def fresh(generator):
    return lambda *_: torch.randn(SHAPE, generator=generator)


def published(steps, generator, **schedule):
    """The x0 of every step, by diffusers' scheduler on the published network."""
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, **schedule)
    x, estimates = noise() * SIGMA_DATA, []
    for angle in scheduler.timesteps[:-1]:
        x, x0 = scheduler.step(trigflow_network(x, angle), angle, x, generator=generator, return_dict=False)
        estimates.append(x0 / SIGMA_DATA)
    return estimates


def ours(sigmas, generator):
    estimates = []
    x = sample_scm(
        flow_denoiser(velocity),
        pure_noise_scale(sigmas[0].item()) * noise(),
        sigmas,
        noise_sampler=fresh(generator),
        callback=lambda step: estimates.append(step["denoised"]),
        disable=True,
    )
    assert torch.equal(x, estimates[-1])
    return estimates


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize("steps, intermediate", [(1, None), (2, 1.3), (2, 1.0), (3, None), (4, None)])
def test_agrees_with_diffusers(steps, intermediate):
    left, right = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    sigmas = angles_to_sigmas(get_timesteps_scm(steps, intermediate) if intermediate else get_timesteps_scm(steps))
    assert_close(ours(sigmas, left), published(steps, right, intermediate_timesteps=intermediate))
    assert torch.equal(left.get_state(), right.get_state()), "the generators must be left alike"


def test_agrees_with_diffusers_on_own_timesteps():
    angles = [1.2, 0.9, 0.4, 0.0]
    theirs = published(
        3, torch.Generator().manual_seed(5), timesteps=angles, max_timesteps=None, intermediate_timesteps=None
    )
    assert_close(ours(get_sigmas_scm(timesteps=angles), torch.Generator().manual_seed(5)), theirs)


def test_official_timesteps():
    assert get_timesteps_scm(2).tolist() == pytest.approx([1.5708, 1.3, 0], abs=1e-7)
    assert torch.equal(get_timesteps_scm(), get_timesteps_scm(2))
    assert get_timesteps_scm(1).tolist() == pytest.approx([1.5708, 0], abs=1e-7)
    assert get_timesteps_scm(4).tolist() == pytest.approx([1.5708, 1.1781, 0.7854, 0.3927, 0], abs=1e-6)
    assert get_timesteps_scm(timesteps=(1.4, 0.7, 0)).tolist() == pytest.approx([1.4, 0.7, 0])


def test_sigmas_by_hand():
    sigmas = get_sigmas_scm(timesteps=[1.5708, math.pi / 4, 0])
    assert sigmas.tolist() == pytest.approx([1.0000036, 0.5, 0], abs=2e-7)
    assert sigmas.dtype == torch.float32
    assert starts_from_noise(sigmas) and not starts_from_noise(sigmas[1:])


@pytest.mark.parametrize(
    "steps, strength, left",
    [(2, 1.0, 2), (2, 0.6, 2), (2, 0.5, 1), (2, 0.01, 1), (4, 0.75, 3), (4, 0.3, 2), (1, 0.1, 1)],
)
def test_strength_leaves_the_last_steps(steps, strength, left):
    timesteps = get_timesteps_scm(steps)
    assert torch.equal(partial_schedule(timesteps, strength), timesteps[-left - 1 :])


def test_fresh_noise_differs_per_step_and_comes_from_torch_by_default():
    states = []
    sigmas = get_sigmas_scm(4)
    torch.manual_seed(3)
    expected = torch.randn(SHAPE)
    torch.manual_seed(3)
    zero = torch.zeros(SHAPE)
    sample_scm(lambda x, sigma: zero, zero, sigmas, callback=lambda step: states.append(step["x"]), disable=True)
    torch.testing.assert_close(states[1], sigmas[1] * expected)
    assert not torch.equal(states[2] / sigmas[2], states[1] / sigmas[1])


def test_a_noise_sampler_is_told_the_levels():
    asked = []
    sigmas = get_sigmas_scm(2)
    zero = torch.zeros(SHAPE)

    def noise_sampler(sigma, sigma_next):
        asked.append((sigma.item(), sigma_next.item()))
        return zero

    sample_scm(lambda x, sigma: x, zero, sigmas, noise_sampler=noise_sampler, disable=True)
    levels = sigmas.tolist()
    assert asked == [(levels[0], levels[1]), (levels[1], levels[2])]


def test_narrow_latents_become_wide():
    x = noise().bfloat16()
    assert sample_scm(flow_denoiser(velocity), x, get_sigmas_scm(2), disable=True).dtype == torch.float32
    wide = sample_scm(flow_denoiser(velocity), x.double(), get_sigmas_scm(2), disable=True)
    assert wide.dtype == torch.float64


def test_extra_arguments_reach_the_model():
    seen = []

    def model(x, sigma, **options):
        seen.append((sigma.shape, options))
        return x

    sample_scm(model, noise(), get_sigmas_scm(1), extra_args={"seed": 7}, disable=True)
    assert seen == [((2,), {"seed": 7})]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "0 sampling steps"),
        ({"steps": 2, "intermediate": 1.6}, "1.6, 0; expected angles that fall"),
        ({"timesteps": []}, "timesteps are none"),
        ({"timesteps": [0.0]}, "timesteps are 0;"),
        ({"timesteps": [1.5708, 1.3]}, "fall from at most 1.5708 to 0"),
        ({"timesteps": [1.3, 1.4, 0]}, "1.3, 1.4, 0"),
        ({"timesteps": [1.58, 0]}, "at most 1.5708"),
        ({"timesteps": [float("nan"), 0]}, "timesteps are nan"),
        ({"steps": 2, "timesteps": [1.5, 0]}, "2 timesteps for 2 steps: there must be 3"),
    ],
)
def test_bad_timesteps_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_timesteps_scm(**arguments)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.01, float("nan")])
def test_bad_strength_is_refused(strength):
    with pytest.raises(ValueError, match="strength is"):
        partial_schedule(get_timesteps_scm(2), strength)


def test_sigmas_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="fall to 0, got 1, 0.5"):
        sample_scm(flow_denoiser(velocity), noise(), torch.tensor([1.0, 0.5]), disable=True)
