"""Inputs for the tests of the fused kernels, and how far from float64 a result may be."""

import os
import sys

import pytest
import torch

from sana_core.kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def require_device():
    """Skip the module where its kernels cannot run; test_interpreter.py runs it on the CPU."""
    pytest.importorskip("triton")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU; test_interpreter.py runs these tests on the CPU", allow_module_level=True)


def device():
    return "cpu" if INTERPRETED else "cuda"


def module_of(function):
    """Where its settings are; in the package the function has taken the name of its module."""
    return sys.modules[function.__module__]


def draw(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device(), dtype)


def run(function, inputs, gradient, *others):
    """Result and gradients of a function of some tensors, which keep their strides."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    result = function(*inputs, *others)
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def check(name, fused, inputs, *others, gradient=None, slack=2.0, arrange=lambda function: function):
    """Asserts that result and gradients are not further from float64 than the reference's, but for `slack`.

    The result of a launch without autograd has to be the same. `arrange` makes of a function one of `inputs` and
    `others`, where its own arguments are not these.
    """
    fused, specified, formula = (arrange(function) for function in (fused, getattr(reference, name), EXACT[name]))
    shape = specified(*inputs, *others).shape
    gradient = draw(*shape, dtype=inputs[-1].dtype, seed=9) if gradient is None else gradient
    found = run(fused, inputs, gradient, *others)
    expected = run(specified, inputs, gradient, *others)
    exact = run(formula, [value.double() for value in inputs], gradient.double(), *others)
    for index, (one, other, truth) in enumerate(zip(found, expected, exact, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape
        floor = max(torch.finfo(one.dtype).eps / 2, 2e-7)  # rounding a float64 result, and a few float32 steps
        assert distance(one, truth) <= max(slack * distance(other, truth), floor), f"tensor {index}"
    with torch.no_grad():
        assert torch.equal(fused(*inputs, *others), found[0])
    return found


def _linear_attention(q, k, v, eps, norms=None):
    if norms is not None:
        q, k = _normed(q, norms.q_weight, norms.eps), _normed(k, norms.k_weight, norms.eps)
    q, k = q.relu(), k.relu()
    result = torch.einsum("bnhd,bmhd,bmhe->bnhe", q, k, v)
    return result / (torch.einsum("bnhd,bmhd->bnh", q, k)[..., None] + eps)


def _normed(x, weight, eps):
    """RMS norm over heads and their widths [B, N, H, D] together."""
    return x / (x.square().mean((2, 3), keepdim=True) + eps).sqrt() * weight.view(x.shape[2:])


EXACT = {  # the other specifications keep float64
    "linear_attention": _linear_attention,
    "modulate": reference.modulate,
    "gated_residual": reference.gated_residual,
    "gated_depthwise": reference.gated_depthwise,
    "rms_norm": reference.rms_norm,
}
