"""The fused RMS norm with residual against float64 and the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.kernels import fused
from tests.kernels.fused import DTYPES, check, draw, module_of

fused.require_device()
from sana_core.kernels.fused.rms_norm import rms_norm  # noqa: E402

EPS = 1e-5


def inputs(*shape, dtype=torch.float32):
    """x, weight, bias and residual."""
    rows = [draw(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    return [rows[0], *(draw(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3)), rows[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 7, 9, 96), (1, 20, 25, 128), (1, 25, 40, 20), (1, 1, 3, 1024)])
def test_result_and_gradients(poisoned, shape, dtype):
    check("rms_norm", rms_norm, inputs(*shape, dtype=dtype), EPS)


def test_without_residual(poisoned):
    x, weight, bias, _ = inputs(2, 5, 5, 24)
    found = rms_norm(x, weight, bias, None, EPS)
    assert torch.equal(found, rms_norm(x, weight, bias, torch.zeros_like(x), EPS))


def test_maps_whose_channels_lie_apart(poisoned):
    x, weight, bias, residual = inputs(2, 24, 3, 5)
    x, residual = x.movedim(1, -1), residual.movedim(1, -1)
    weight, bias = draw(24, seed=2), draw(24, seed=3)
    check("rms_norm", rms_norm, [x, weight, bias, residual], EPS, gradient=draw(1, 1, 1, 1).expand(2, 3, 5, 24))


def test_programs_of_several_blocks(poisoned, monkeypatch):
    monkeypatch.setattr(module_of(rms_norm), "BLOCK", 64)
    monkeypatch.setattr(module_of(rms_norm), "MOST_PARTS", 3)
    check("rms_norm", rms_norm, inputs(1, 7, 9, 16), EPS)
