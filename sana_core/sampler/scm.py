"""SCM, the few-step sampler of SANA-Sprint (arXiv:2503.09641), written in the coordinates of flow matching.

Sprint was distilled under TrigFlow (sCM, arXiv:2410.11081): at the angle t a latent is sigma_data * (cos(t) * x0 +
sin(t) * noise) with sigma_data 0.5, a network F gives x0 = cos(t) * x - sin(t) * F, and a step goes back to a smaller
angle with fresh noise. F itself is made of a flow-matching network v: with sigma = sin(t) / (sin(t) + cos(t)), the
input of v is x / (sigma_data * (sin(t) + cos(t))) = (1 - sigma) * x0 + sigma * noise. Put into each other, sigma_data,
sines and cosines cancel, and what remains is x0 = x - sigma * v and x = (1 - sigma) * x0 + sigma * noise.

Source of the angles: NVlabs/Sana `diffusion/scheduler/scm_scheduler.py`, diffusers `SCMScheduler`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import trange

from .flow import denoise
from .schedule import partial_schedule

LARGEST_ANGLE = 1.57080  # the official one: a trifle above pi / 2, so that the first sigma is a trifle above 1
INTERMEDIATE_ANGLE = 1.3  # between the two steps that Sprint is mostly used with
DEFAULT_STEPS = 2
IMAGE_IGNORED = (  # for the log, with the strength and the number of steps
    "a strength of %g leaves all %d steps, which start from noise alone: the image does not count. Lower the strength "
    "by a step's share, or give timesteps that start below 1.57"
)


def get_timesteps_scm(
    steps: int | None = None, intermediate: float = INTERMEDIATE_ANGLE, timesteps: Sequence[float] | None = None
) -> Tensor:
    """TrigFlow angles in radians from 1.5708 to 0: steps + 1 float32 values.

    steps: 1 to 4 suit Sprint; None means 2, or as many as `timesteps` has.
    intermediate: where the second of two steps starts; other numbers of steps are spread evenly.
    timesteps: angles to take instead, falling to 0.

    Raises ValueError for steps below 1, and for timesteps that do not fall to 0 or are not steps + 1.
    """
    if timesteps is not None:
        return _checked_angles([float(angle) for angle in timesteps], steps)
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 1:
        raise ValueError(f"{steps} sampling steps asked for, expected at least 1 (Sana-Sprint takes 1 to 4)")
    if steps == 2:
        return _checked_angles([LARGEST_ANGLE, float(intermediate), 0.0], steps)
    return torch.linspace(LARGEST_ANGLE, 0, steps + 1)


def angles_to_sigmas(timesteps: Tensor) -> Tensor:
    """Noise levels of flow matching, sin / (sin + cos), of TrigFlow angles; float32."""
    angles = timesteps.double()
    return (angles.sin() / (angles.sin() + angles.cos())).float()


def get_sigmas_scm(steps: int | None = None, timesteps: Sequence[float] | None = None, strength: float = 1.0) -> Tensor:
    """The noise levels of `get_timesteps_scm`'s angles, without those that `partial_schedule` leaves out."""
    return angles_to_sigmas(partial_schedule(get_timesteps_scm(steps, timesteps=timesteps), strength))


def starts_from_noise(sigmas: Tensor) -> bool:
    """Whether nothing of an image is left at the first level."""
    return sigmas[0].item() > 0.999


def pure_noise_scale(sigma: float) -> float:
    """What noise of unit deviation is multiplied by where it is all that there is of a latent at this level.

    TrigFlow starts from sigma_data * noise at any angle, which is hypot(sigma, 1 - sigma) * noise here.
    """
    return math.hypot(sigma, 1 - sigma)


def flow_denoiser(velocity: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn `velocity(x, sigma)`, noise - x0, into the `model(x, sigma) -> denoised` that samplers call."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma.reshape(-1, 1, 1, 1) * velocity(x, sigma).to(x.dtype)

    return denoiser


@torch.no_grad()
def sample_scm(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Denoise, add fresh noise of the next level, and again. Arguments as for the samplers in flow.py, and

    noise_sampler: `noise_sampler(sigma, sigma_next)` returns unit noise of x's shape; None takes PyTorch's global
        generator. It is asked at the last step too, where its noise counts nothing: diffusers' generators move on so.
        All is drawn before the first step, since each would wait until noise from a CPU has got to the GPU.

    Raises ValueError for sigmas that do not fall to 0.
    """
    levels = _checked_levels(sigmas)
    x, sigmas = x.to(torch.promote_types(x.dtype, torch.float32)), sigmas.to(x.device)
    steps = range(len(levels) - 1)
    drawn = None if noise_sampler is None else [noise_sampler(sigmas[i], sigmas[i + 1]).to(x) for i in steps]
    for i in trange(len(steps), disable=disable):
        denoised = denoise(model, x, sigmas, i, extra_args, callback)
        noise = torch.randn_like(x) if drawn is None else drawn[i]
        x = torch.lerp(denoised, noise, levels[i + 1])
    return x


def _checked_angles(angles: list[float], steps: int | None) -> Tensor:
    if steps is not None and len(angles) != steps + 1:
        raise ValueError(f"{len(angles)} timesteps for {steps} steps: there must be {steps + 1}, the last one 0")
    if not _fall_to_zero(angles) or angles[0] > LARGEST_ANGLE:
        raise ValueError(
            f"timesteps are {', '.join(f'{angle:g}' for angle in angles) or 'none'}; expected angles that fall from at "
            f"most {LARGEST_ANGLE} to 0, such as 1.5708, 1.3, 0"
        )
    return torch.tensor(angles)


def _checked_levels(sigmas: Tensor) -> list[float]:
    levels = sigmas.tolist()
    if not _fall_to_zero(levels):
        raise ValueError(f"the SCM sampler needs sigmas that fall to 0, got {', '.join(f'{s:g}' for s in levels)}")
    return levels


def _fall_to_zero(values: list[float]) -> bool:
    falling = all(value > after for value, after in zip(values, values[1:], strict=False))
    return len(values) > 1 and falling and values[-1] == 0
