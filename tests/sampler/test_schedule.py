import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sana_core.sampler.schedule import SCHEDULES, get_sigmas_flow, get_sigmas_flow_euler, shift_sigma

# Computed from the official code, not from this one.
SHIFT_3 = [
    0.999666, 0.98242, 0.963941, 0.944094, 0.922722, 0.89964, 0.874635, 0.847457, 0.81781, 0.78534, 0.749625,
    0.710152, 0.666296, 0.617284, 0.562148, 0.499667, 0.428265, 0.345888, 0.249792, 0.13624, 0,
]  # fmt: skip
TIMESTEPS_3 = [999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136]


def test_flow_schedule_is_the_official_one():
    sigmas = get_sigmas_flow(20, 3.0)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor(SHIFT_3), atol=1e-6, rtol=0)
    assert (1000 * sigmas[:-1]).floor().int().tolist() == TIMESTEPS_3


@pytest.mark.parametrize(
    "shift, first, second, last", [(4.0, 0.99975, 0.986756, 0.173762), (6.0, 0.999833, 0.991132, 0.239808)]
)
def test_flow_schedule_of_other_shifts(shift, first, second, last):
    sigmas = get_sigmas_flow(20, shift)
    torch.testing.assert_close(sigmas[[0, 1, -2, -1]], torch.tensor([first, second, last, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("steps", [1, 4, 14, 20, 50])
def test_flow_schedule_matches_diffusers(shift, steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    sigmas = get_sigmas_flow(steps, shift)
    torch.testing.assert_close(sigmas, scheduler.sigmas.float(), atol=1e-7, rtol=0)
    assert (1000 * sigmas[:-1]).floor().long().tolist() == scheduler.timesteps.tolist()


def test_euler_schedule_is_the_official_one():
    sigmas = get_sigmas_flow_euler(20, 3.0)
    expected = torch.tensor([1.0, 0.98187, 0.96239, 0.36435, 0.26633, 0.14979, 0.00893, 0])
    torch.testing.assert_close(sigmas[[0, 1, 2, 16, 17, 18, 19, 20]], expected, atol=6e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 28])
def test_euler_schedule_matches_diffusers(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = get_sigmas_flow_euler(steps, shift)
    torch.testing.assert_close(sigmas, scheduler.sigmas.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(1000 * sigmas[:-1], scheduler.timesteps.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_schedule_falls_to_zero(schedule, steps):
    sigmas = schedule(steps, 3.0)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_bad_arguments_are_named(schedule):
    with pytest.raises(ValueError, match="0 sampling steps"):
        schedule(0, 3.0)
    with pytest.raises(ValueError, match="shift is 0"):
        schedule(20, 0)


def test_shift_keeps_the_ends_and_composes():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert shift_sigma(sigma, 3.0)[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 2.0), 3.0), shift_sigma(sigma, 6.0))
