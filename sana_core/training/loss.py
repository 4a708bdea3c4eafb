"""The flow-matching objective of Sana (NVlabs/Sana `diffusion/model/gaussian_diffusion.py`, `respace.py`)."""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def sample_sigmas(count: int, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels to train on: logit-normal on the grid 0, 0.001 ... 0.999, and only then shifted.

    Args:
        count: how many.
        shift: of the flow schedule; larger means more noise.
        generator: on the CPU, so that a run can be repeated on any device.

    Returns:
        [count] float32 in [0, 1), on the CPU.
    """
    u = torch.randn(count, generator=generator).sigmoid()
    base = (u * NUM_TIMESTEPS).floor() / NUM_TIMESTEPS
    return shift * base / (1 + (shift - 1) * base)


def flow_matching_loss(velocity_model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, sigma: Tensor):
    """Mean squared error of the velocity noise - x0, without weights.

    Args:
        velocity_model: maps x_t [B, C, h, w] and the timestep [B], the truncated 1000 * sigma, to a velocity.
        x0: scaled latents [B, C, h, w].
        noise: standard normal, shape of x0.
        sigma: [B] in [0, 1).

    Returns:
        Scalar float32.
    """
    sigma = sigma.to(x0)
    level = sigma[:, None, None, None]
    x_t = (1 - level) * x0 + level * noise
    timestep = (sigma * NUM_TIMESTEPS).floor()
    return (velocity_model(x_t, timestep).float() - (noise - x0).float()).square().mean()


def drop_captions(
    embeds: Tensor, mask: Tensor, null_embeds: Tensor, null_mask: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces the dropped captions by the null caption and its mask, as unguided sampling will.

    Args:
        embeds, mask: [B, L, C] and [B, L].
        null_embeds, null_mask: [L, C] and [L], of the empty prompt.
        dropped: [B] bool.
    """
    return (
        torch.where(dropped[:, None, None], null_embeds, embeds),
        torch.where(dropped[:, None], null_mask, mask),
    )
