"""From velocity predictions to the guided, denoised x0 that samplers ask for."""

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond); velocities or denoised x0 of one shape (Ho & Salimans, arXiv:2207.12598)."""
    return uncond + scale * (cond - uncond)


def cfg_denoiser(
    velocity: Callable[[Tensor, Tensor], Tensor], *, scale: float = 1.0, floor_timesteps: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a velocity prediction into the `model(x, sigma) -> denoised` that samplers call.

    `velocity(x, timestep)` predicts noise - x0. With a scale other than 1 it is called once for both captions, on x
    [2B, C, h, w] and timestep [2B], rows in the order [uncond, cond]; with scale 1 on the B conditional rows.
    `floor_timesteps` feeds floor(1000 * sigma), as Flow-DPM-Solver does; otherwise the timestep is a fraction.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        timestep = 1000 * sigma
        if floor_timesteps:
            timestep = timestep.floor()
        if scale == 1:
            guided = velocity(x, timestep).to(x.dtype)
        else:
            rows = velocity(torch.cat([x, x]), torch.cat([timestep, timestep])).to(x.dtype)
            uncond, cond = rows.chunk(2)
            guided = classifier_free_guidance(cond, uncond, scale)
        return x - sigma.reshape(-1, 1, 1, 1) * guided

    return denoise
