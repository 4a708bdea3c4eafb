"""Samplers against closed forms and other programs' solvers: none of these tests needs a network."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sana_core.sampler.flow import SAMPLERS, sample_flow_dpm_solver, sample_flow_euler
from sana_core.sampler.schedule import get_sigmas_flow, get_sigmas_flow_euler

MEAN, DEVIATION = 0.7, 0.4  # of the Gaussian data whose exact flow is known


def expected_x0(x, sigma):
    """E[x0 | x] for Gaussian data: the denoiser that a perfect model would be."""
    alpha = 1 - sigma
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def exact_flow(x, start, end):
    """Where the flow ODE takes x from sigma `start` to sigma `end` for the same data."""

    def deviation(sigma):
        return math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)

    return (1 - end) * MEAN + deviation(end) / deviation(start) * (x - (1 - start) * MEAN)


def denoiser(x, sigma):
    return expected_x0(x, sigma.reshape(-1, 1, 1, 1))


def curved_denoiser(x, sigma):
    """Nothing in particular, but smooth and not linear in x."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    return torch.tanh(x * (1.5 - sigma)) + 0.3 * torch.sin(5 * sigma + x)


def noise(dtype=torch.float32):
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def official_dpm_solver(model, x, sigmas):
    """The paper's formulas as they are written, in float64: exponentials, r0 and all."""
    previous = lambda_previous = None
    for i in range(len(sigmas) - 1):
        sigma_s, sigma_t = sigmas[i], sigmas[i + 1]
        lambda_s = math.log((1 - sigma_s) / sigma_s)
        x0 = model(x, torch.tensor([sigma_s] * x.shape[0], dtype=torch.float64))
        if i == len(sigmas) - 2:
            x = (sigma_t / sigma_s) * x - (1 - sigma_t) * math.expm1(-math.inf) * x0
        else:
            lambda_t = math.log((1 - sigma_t) / sigma_t)
            h = lambda_t - lambda_s
            d1 = 0 if previous is None else (x0 - previous) / ((lambda_s - lambda_previous) / h)
            x = (sigma_t / sigma_s) * x - (1 - sigma_t) * math.expm1(-h) * (x0 + 0.5 * d1)
        previous, lambda_previous = x0, lambda_s
    return x


def diffusers_trajectory(scheduler, model, x, steps):
    scheduler.set_timesteps(steps)
    states = []
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].to(x)
        velocity = (x - model(x, sigma.expand(x.shape[0]))) / sigma
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        states.append(x)
    return states


def trajectory(sample, model, x, sigmas):
    states = []
    final = sample(model, x, sigmas, callback=lambda step: states.append(step["x"]), disable=True)
    return [*states[1:], final]


@pytest.mark.parametrize("shift", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("model", [denoiser, curved_denoiser])
def test_dpm_solver_follows_diffusers(shift, model):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, final_sigmas_type="zero"
    )
    expected = diffusers_trajectory(scheduler, model, noise(torch.float64), 20)
    actual = trajectory(sample_flow_dpm_solver, model, noise(torch.float64), get_sigmas_flow(20, shift))
    assert len(actual) == len(expected) == 20
    assert max(map(relative, actual, expected)) < 1e-5  # diffusers computes lambda from float32


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("model", [denoiser, curved_denoiser])
def test_dpm_solver_is_the_official_formula(shift, model):
    sigmas = get_sigmas_flow(20, shift)
    expected = official_dpm_solver(model, noise(torch.float64), sigmas.tolist())
    assert relative(sample_flow_dpm_solver(model, noise(torch.float64), sigmas, disable=True), expected) < 1e-12
    assert relative(sample_flow_dpm_solver(model, noise(), sigmas, disable=True), expected) < 2e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
def test_dpm_solver_at_other_step_counts(steps):
    sigmas = get_sigmas_flow(steps, 3.0)
    expected = official_dpm_solver(curved_denoiser, noise(torch.float64), sigmas.tolist())
    actual = sample_flow_dpm_solver(curved_denoiser, noise(torch.float64), sigmas, disable=True)
    assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_follows_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = diffusers_trajectory(scheduler, curved_denoiser, noise(), 20)
    actual = trajectory(sample_flow_euler, curved_denoiser, noise(), get_sigmas_flow_euler(20, shift))
    assert max(map(relative, actual, expected)) < 5e-6


@pytest.mark.parametrize(
    "sample, order, error_at_40",
    [(sample_flow_euler, 1, 3e-2), (sample_flow_dpm_solver, 2, 4e-3)],
)
def test_samplers_converge_with_their_order(sample, order, error_at_40):
    """Twice the steps divide the error by 2 to the order, measured where the exact solution is known."""
    x, errors = noise(torch.float64), []
    for steps in (40, 80, 160, 320):
        sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        errors.append(relative(sample(denoiser, x, sigmas, disable=True), exact_flow(x, 0.95, 0.05)))
    assert errors[0] < error_at_40
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_dpm_solver_beats_euler_on_the_real_schedule():
    x, sigmas = noise(torch.float64), get_sigmas_flow(20, 3.0)
    exact = exact_flow(x, sigmas[0].item(), 0)
    errors = [relative(sample(denoiser, x, sigmas, disable=True), exact) for sample in SAMPLERS.values()]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("sample", SAMPLERS.values())
def test_a_perfect_guess_is_returned_at_once(sample):
    target = noise() * 3
    result = sample(lambda x, sigma: target, torch.randn(2, 4, 3, 5), get_sigmas_flow(1, 3.0), disable=True)
    torch.testing.assert_close(result, target, rtol=0, atol=0)


@pytest.mark.parametrize("sample", SAMPLERS.values())
def test_schedules_that_start_at_one_or_stand_still_are_finite(sample):
    for levels in ([1.0, 0.7, 0.3, 0.0], [0.9, 0.5, 0.5, 0.2, 0.0], [0.2, 0.6, 0.9, 1.0]):
        result = sample(curved_denoiser, noise(), torch.tensor(levels), disable=True)
        assert result.isfinite().all(), levels


@pytest.mark.parametrize("sample", SAMPLERS.values())
def test_half_precision_latents_are_widened(sample):
    def model(x, sigma):
        assert x.dtype == sigma.dtype == torch.float32
        return denoiser(x, sigma).bfloat16()

    result = sample(model, noise(torch.bfloat16), get_sigmas_flow(3, 3.0), disable=True)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("sample", SAMPLERS.values())
def test_arguments_and_progress_reach_their_place(sample):
    seen, steps, start = [], [], noise()

    def model(x, sigma, cond_scale):
        seen.append((sigma.tolist(), cond_scale))
        return denoiser(x, sigma)

    sigmas = get_sigmas_flow(4, 3.0)
    kept = start.clone()
    sample(model, start, sigmas, extra_args={"cond_scale": 2}, callback=steps.append, disable=True)
    assert seen == [([sigma] * 2, 2) for sigma in sigmas[:-1].tolist()]
    assert [step["i"] for step in steps] == [0, 1, 2, 3]
    assert set(steps[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    assert torch.equal(start, kept) and torch.equal(steps[0]["x"], kept)


@pytest.mark.parametrize("sample", SAMPLERS.values())
@pytest.mark.parametrize("levels", [[14.6, 3.0, 0.0], [0.9, 0.0, 0.0], [0.5, -0.1]])
def test_sigmas_of_other_models_are_refused(sample, levels):
    with pytest.raises(ValueError, match="sigmas from 1 to 0"):
        sample(denoiser, noise(), torch.tensor(levels), disable=True)
