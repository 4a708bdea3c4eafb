"""From velocity predictions to the guided, denoised x0 that samplers ask for."""

import struct
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PAG_OFF = 1.0  # official Sana perturbs nothing up to this scale; a scale above it counts whole
Interval = tuple[float, float]  # of sigma, after the shift, both ends excluded


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond); velocities or denoised x0 of one shape (Ho & Salimans, arXiv:2207.12598)."""
    return uncond + scale * (cond - uncond)


def perturbed_attention_guidance(guided: Tensor, cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    """guided + scale * (cond - perturbed); velocities or denoised x0 of one shape (Ahn et al., arXiv:2403.17377).

    `guided` is cond, or what classifier-free guidance made of it; `perturbed` is predicted from the same caption.
    """
    return guided + scale * (cond - perturbed)


def parse_layers(text: str) -> list[int]:
    """Indices of blocks written as "8" or "8, 14". Raises ValueError for anything else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f'the layers are {text!r}: expected numbers with commas between them, as "8" or "8, 14"'
        ) from error


def check_interval(interval: Interval) -> None:
    """Raises ValueError if no sigma can lie in it (Kynkäänniemi et al., arXiv:2404.07724, limit guidance to one)."""
    low, high = interval
    if not low < high:
        raise ValueError(f"the guidance interval {low} to {high} is empty: expected two sigmas, the lower one first")


def is_within(interval: Interval | None, level: float) -> bool:
    """Whether guidance acts at this noise level, a float32 value; without interval it always does."""
    if interval is None:
        return True
    low, high = struct.unpack("2f", struct.pack("2f", *interval))  # rounded like the level, so that ends are excluded
    return low < level < high


def cfg_denoiser(
    velocity: Callable[..., Tensor],
    *,
    scale: float = 1.0,
    pag_scale: float = PAG_OFF,
    interval: Interval | None = None,
    levels: Iterable[float] = (),
    floor_timesteps: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a velocity prediction into the `model(x, sigma) -> denoised` that samplers call.

    `velocity(x, timestep)` predicts noise - x0. With a scale other than 1 it is called once for both captions, on x
    [2B, C, h, w] and timestep [2B], rows in the order [uncond, cond]; with scale 1 on the B conditional rows.
    With a `pag_scale` above 1, `velocity(x, timestep, B)` appends B rows: the conditional ones, perturbed.
    `interval`: outside of it, velocity is called on the conditional rows alone. As in official Sana the interval does
    not count while perturbed-attention guidance is on.
    `levels`: the sigmas of all calls, in order, which an interval needs: to read them from a GPU, each step would wait.
    `floor_timesteps` feeds floor(1000 * sigma), as Flow-DPM-Solver does; otherwise the timestep is a fraction.

    Raises ValueError for an empty interval.
    """
    if interval is not None:
        check_interval(interval)
    perturbs = pag_scale > PAG_OFF
    if perturbs:
        interval = None
    guided_steps = iter([is_within(interval, level) for level in levels])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        timestep = 1000 * sigma
        if floor_timesteps:
            timestep = timestep.floor()
        inputs = x, timestep
        if scale != 1 and (interval is None or next(guided_steps)):
            inputs = torch.cat([x, x]), torch.cat([timestep, timestep])
        rows = velocity(*inputs, len(x)) if perturbs else velocity(*inputs)
        parts = list(rows.to(x.dtype).split(len(x)))
        perturbed = parts.pop() if perturbs else None
        cond = guided = parts.pop()
        if parts:
            guided = classifier_free_guidance(cond, parts[0], scale)
        if perturbs:
            guided = perturbed_attention_guidance(guided, cond, perturbed, pag_scale)
        return x - sigma.reshape(-1, 1, 1, 1) * guided

    return denoise
