"""Solvers of the flow ODE, all with k-diffusion's signature, so that ComfyUI's KSAMPLER can call them as well.

`model(x, sigma, **extra_args)` returns the denoised x0 for x [B, C, h, w] and sigma [B]; `sigmas` falls from 1 towards
0. `callback` gets a dict with x, i, sigma, sigma_hat and denoised before each step. `disable` is tqdm's: True hides the
progress bar, None hides it away from a terminal. Latents stay in float32 (or the wider dtype of x) between steps.
"""

import math
from collections.abc import Callable

import torch
from tqdm.auto import trange


@torch.no_grad()
def sample_flow_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """First order: x + (sigma_next - sigma) * velocity, written with the denoised x0."""
    x, sigmas, levels = _prepare(x, sigmas)
    for i in trange(len(levels) - 1, disable=disable):
        denoised = denoise(model, x, sigmas, i, extra_args, callback)
        x = torch.lerp(denoised, x, levels[i + 1] / levels[i])
    return x


@torch.no_grad()
def sample_flow_dpm_solver(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Flow-DPM-Solver: second-order multistep DPM-Solver++ (midpoint) for alpha = 1 - sigma (Sana, arXiv:2410.10629).

    The official step (sigma_t / sigma_s) * x - alpha_t * (exp(-h) - 1) * D reduces to a mix of D and x with the ratio
    sigma_t / sigma_s, since alpha_t * (exp(-h) - 1) = sigma_t / sigma_s - 1. D adds to x0 half its extrapolated change
    in lambda = log(alpha / sigma). A first step and a step to where lambda is infinite, sigma 0, take D = x0.
    """
    x, sigmas, levels = _prepare(x, sigmas)
    previous = None
    for i in trange(len(levels) - 1, disable=disable):
        denoised = denoise(model, x, sigmas, i, extra_args, callback)
        estimate = denoised
        if previous is not None and 0 < levels[i + 1] < 1:
            estimate = denoised + (denoised - previous) * (_step_ratio(levels, i) / 2)
        x = torch.lerp(estimate, x, levels[i + 1] / levels[i])
        previous = denoised
    return x


def _prepare(x, sigmas):
    """Latents in at least float32, the sigmas where they are, and as Python floats: no step then waits for a device."""
    levels = sigmas.tolist()
    if not all(0 <= sigma <= 1 for sigma in levels) or 0 in levels[:-1]:
        raise ValueError(
            "flow samplers need sigmas from 1 to 0, with 0 only as the last, as flow-matching models such as Sana "
            f"have; got {len(levels)} between {min(levels):.6g} and {max(levels):.6g}"
        )
    return x.to(torch.promote_types(x.dtype, torch.float32)), sigmas.to(x.device), levels


def denoise(model, x, sigmas, i, extra_args, callback):
    """What the model makes of x at sigmas[i], in x's dtype; tells the callback."""
    sigma = sigmas[i].to(x)
    denoised = model(x, sigma.expand(x.shape[0]), **(extra_args or {})).to(x.dtype)
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
    return denoised


def _step_ratio(levels: list[float], i: int) -> float:
    """This step's length over the last one's, both in lambda: 1 / r0 of DPM-Solver++."""
    last = _lambda(levels[i]) - _lambda(levels[i - 1])
    return (_lambda(levels[i + 1]) - _lambda(levels[i])) / last if last else 0.0


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {
    "flow_dpm-solver": sample_flow_dpm_solver,
    "flow_euler": sample_flow_euler,
}
