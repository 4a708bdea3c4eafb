import pytest
import torch

from sana_core.sampler.guidance import cfg_denoiser, classifier_free_guidance


def test_guidance_is_the_published_formula():
    cond, uncond = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    assert classifier_free_guidance(cond, uncond, 4.5).tolist() == [5.5, -8.0]
    assert torch.equal(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)


class Velocity:
    """Answers row by row: `uncond_velocity` for the first half of a doubled batch, `cond_velocity` for the rest."""

    uncond_velocity, cond_velocity = 0.25, 1.0

    def __init__(self, dtype=torch.float32):
        self.calls, self.dtype = [], dtype

    def __call__(self, x, timestep):
        self.calls.append((x, timestep))
        value = torch.full_like(x, self.cond_velocity)
        if len(x) == 4:
            value[:2] = self.uncond_velocity
        return value.to(self.dtype)


X = torch.randn(2, 4, 3, 5)
SIGMA = torch.tensor([0.98242, 0.499667])


def test_both_captions_share_one_call():
    velocity = Velocity()
    denoised = cfg_denoiser(velocity, scale=4.0)(X, SIGMA)
    ((x, timestep),) = velocity.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert timestep.tolist() == [982, 499, 982, 499]
    guided = 0.25 + 4 * (1 - 0.25)
    torch.testing.assert_close(denoised, X - SIGMA.reshape(2, 1, 1, 1) * guided)


def test_scale_one_asks_for_the_conditional_rows_only():
    velocity = Velocity()
    denoised = cfg_denoiser(velocity, scale=1.0)(X, SIGMA)
    assert [len(x) for x, _ in velocity.calls] == [2]
    torch.testing.assert_close(denoised, X - SIGMA.reshape(2, 1, 1, 1))


def test_timesteps_may_stay_fractions():
    velocity = Velocity()
    cfg_denoiser(velocity, floor_timesteps=False)(X, SIGMA)
    torch.testing.assert_close(velocity.calls[0][1], 1000 * SIGMA)


def test_half_precision_velocities_are_guided_in_float32():
    denoised = cfg_denoiser(Velocity(torch.bfloat16), scale=4.5)(X, SIGMA)
    assert denoised.dtype == torch.float32
    assert denoised == pytest.approx(X - SIGMA.reshape(2, 1, 1, 1) * (0.25 + 4.5 * 0.75))
