import pytest
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin

from sana_core.sampler.guidance import (
    cfg_denoiser,
    classifier_free_guidance,
    parse_layers,
    perturbed_attention_guidance,
)


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


class Perturbable:
    """Random velocities, one for each row; with perturbed rows asked for, as many more."""

    def __init__(self):
        self.rows, self.given = [], None

    def __call__(self, x, timestep, perturbed_rows=0):
        self.rows.append((len(x), perturbed_rows))
        self.given = torch.randn(len(x) + perturbed_rows, *x.shape[1:], generator=torch.Generator().manual_seed(5))
        return self.given


def velocity_of(denoised):
    return (X - denoised) / SIGMA.reshape(2, 1, 1, 1)


def diffusers_guidance(velocities, scale, pag_scale):
    pipeline = PAGMixin()
    pipeline._pag_scale, pipeline._pag_adaptive_scale = pag_scale, 0.0
    return pipeline._apply_perturbed_attention_guidance(velocities, scale > 1, scale, 500)


@pytest.mark.parametrize("scale, rows", [(5.0, (4, 2)), (1.0, (2, 2))])
@pytest.mark.parametrize("pag_scale", [2.0, 1.01])
def test_perturbed_attention_guidance_is_the_formula_of_diffusers(scale, rows, pag_scale):
    velocity = Perturbable()
    denoised = cfg_denoiser(velocity, scale=scale, pag_scale=pag_scale)(X, SIGMA)
    assert velocity.rows == [rows], "one call, without the negative caption at scale 1"
    expected = diffusers_guidance(velocity.given, scale, pag_scale)
    torch.testing.assert_close(velocity_of(denoised), expected, atol=1e-5, rtol=1e-5)


def test_perturbed_attention_guidance_by_hand():
    """uncond + cfg (cond - uncond) + pag (cond - perturbed), as the authors write it."""
    cond, uncond, perturbed = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.5])
    guided = classifier_free_guidance(cond, uncond, 5.0)
    assert perturbed_attention_guidance(guided, cond, perturbed, 2.0).item() == 1 + 5 * 2 + 2 * 0.5


@pytest.mark.parametrize("pag_scale", [1.0, 0.5, 0.0])
def test_up_to_one_perturbed_attention_guidance_is_off(pag_scale):
    velocity = Velocity()
    off = cfg_denoiser(velocity, scale=4.0, pag_scale=pag_scale)(X, SIGMA)
    assert [len(x) for x, _ in velocity.calls] == [4]
    assert torch.equal(off, cfg_denoiser(Velocity(), scale=4.0)(X, SIGMA))


@pytest.mark.parametrize(
    "interval, guided",
    [
        ((0.55, 0.7), [False, True, False]),
        ((0.5, 0.9), [False, True, False]),  # the lower end is outside
        ((0.1, 0.9), [False, True, True]),  # and so is the upper one
        ((0.0, 1.0), [True, True, True]),
    ],
)
def test_outside_of_the_interval_only_the_prompt_counts(interval, guided):
    velocity = Velocity()
    levels = torch.tensor([0.9, 0.625, 0.5])
    denoise = cfg_denoiser(velocity, scale=4.0, interval=interval, levels=levels.tolist())
    sigmas = [level.expand(2) for level in levels]
    denoised = [denoise(X, sigma) for sigma in sigmas]
    assert [len(x) for x, _ in velocity.calls] == [4 if inside else 2 for inside in guided]
    for sigma, result, inside in zip(sigmas, denoised, guided, strict=True):
        expected = 0.25 + 4 * 0.75 if inside else 1.0
        torch.testing.assert_close(result, X - sigma[0] * expected)


def test_the_interval_does_not_count_with_perturbed_attention_guidance():
    velocity = Perturbable()
    cfg_denoiser(velocity, scale=4.0, pag_scale=2.0, interval=(0.1, 0.2))(X, SIGMA)
    assert velocity.rows == [(4, 2)]


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.2), (float("nan"), 1.0)])
def test_an_empty_interval_is_refused(interval):
    with pytest.raises(ValueError, match="interval .* is empty: expected two sigmas"):
        cfg_denoiser(Velocity(), interval=interval)


def test_layers_are_read_from_text():
    assert parse_layers("8") == [8]
    assert parse_layers(" 8, 14") == [8, 14]
    for wrong in ("", "8;14", "blocks.8", "8,"):
        with pytest.raises(ValueError, match="expected numbers with commas"):
            parse_layers(wrong)
