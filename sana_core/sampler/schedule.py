"""Noise levels: sigma 1 is pure noise, 0 is data, and x = (1 - sigma) * x0 + sigma * noise in between.

Source: NVlabs/Sana `diffusion/model/dpm_solver.py` (time_uniform_flow), diffusers `FlowMatchEulerDiscreteScheduler`.
"""

from collections.abc import Callable

import torch

SIGMA_MIN = 0.001  # of the 1000 training levels, before the shift


def shift_sigma(sigma, shift: float):
    """Move a noise level, or a tensor of them, towards noise: larger pictures need more of it to lose their content.

    shift 1 changes nothing; 0 and 1 stay where they are. Raises ValueError for a shift that is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}, expected a number above 0 (Sana models use 3 to 6)")
    return shift * sigma / (1 + (shift - 1) * sigma)


def get_sigmas_flow(steps: int, shift: float) -> torch.Tensor:
    """The schedule of Flow-DPM-Solver: levels uniform in time, then shifted; steps + 1 float32 values, the last 0."""
    levels = torch.linspace(1 - SIGMA_MIN, 0, _checked(steps) + 1, dtype=torch.float64)
    return shift_sigma(levels, shift).float()


def get_sigmas_flow_euler(steps: int, shift: float) -> torch.Tensor:
    """The schedule that official Sana uses with Euler steps; steps + 1 float32 values, the last 0.

    The shift is applied twice to the low end, since it also moves the level that the uniform grid ends on. The
    models were evaluated that way, so it stays.
    """
    levels = torch.linspace(1, shift_sigma(SIGMA_MIN, shift), _checked(steps), dtype=torch.float64)
    return torch.cat([shift_sigma(levels, shift), levels.new_zeros(1)]).float()


def partial_schedule(schedule: torch.Tensor, strength: float) -> torch.Tensor:
    """The end of a schedule, for image to image: of N steps about N * strength, rounded up, remain.

    As in diffusers' image to image. ComfyUI's `denoise` keeps the number of steps instead, and makes them shorter.
    Raises ValueError unless 0 < strength <= 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, expected above 0 (keep the picture) up to 1 (only noise)")
    steps = len(schedule) - 1
    return schedule[int(steps - steps * strength) :]


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{steps} sampling steps asked for, expected at least 1")
    return steps


SCHEDULES: dict[str, Callable[[int, float], torch.Tensor]] = {  # the schedule that belongs to each sampler
    "flow_dpm-solver": get_sigmas_flow,
    "flow_euler": get_sigmas_flow_euler,
}
