"""The functions of `reference` as Triton kernels, forward and backward.

Each computes in float32 and rounds once, gives bit-equal results for equal inputs, and leaves to the reference what
it does not know: tensors on another device or of other dtypes, unusual shapes, autocast.
"""

from dataclasses import replace

import torch

from .. import REFERENCE, QKNorm
from .gated_depthwise import gated_depthwise
from .gated_residual import gated_residual
from .linear_attention import linear_attention
from .modulate import modulate
from .rms_norm import rms_norm

FUSED = replace(
    REFERENCE,
    linear_attention=linear_attention,
    modulate=modulate,
    gated_residual=gated_residual,
    gated_depthwise=gated_depthwise,
    rms_norm=rms_norm,
)


def check_on(device: torch.device) -> None:
    """Compile and run every kernel once on a few tokens, forward and backward.

    Raises:
        RuntimeError: a result is not the reference's.
        Exception: whatever Triton, its compiler or the driver raise.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()

    queries_keys_values = [draw(1, 20, 2, 32) for _ in range(3)]
    calls = [
        ("linear_attention", (*queries_keys_values, 1e-8)),
        ("linear_attention", (*queries_keys_values, 1e-8, QKNorm(draw(64), draw(64), 1e-5))),
        ("modulate", (draw(1, 20, 64), draw(1, 1, 64), draw(1, 1, 64))),
        ("gated_residual", (draw(1, 20, 64), draw(1, 1, 64), draw(1, 20, 64))),
        ("gated_depthwise", (draw(1, 64, 4, 5), draw(64, 1, 3, 3), draw(64))),
        ("rms_norm", (draw(1, 4, 5, 64), draw(64), draw(64), draw(1, 4, 5, 64), 1e-5)),
    ]
    for name, given in calls:
        values = [part for value in given for part in (value if isinstance(value, QKNorm) else [value])]
        inputs = [value for value in values if isinstance(value, torch.Tensor)]
        with torch.enable_grad():
            results = [getattr(kernels, name)(*given) for kernels in (FUSED, REFERENCE)]
            found, expected = ([one, *torch.autograd.grad(one.sum(), inputs)] for one in results)
        for one, other in zip(found, expected, strict=True):
            error = (one.float() - other.float()).norm() / other.float().norm()
            if not error < 0.05:  # bfloat16 rounds to 0.004; NaN fails as well
                raise RuntimeError(f"{name} is off by {error:.3f} of its size")
