"""The fused depthwise convolution against float64 and the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.kernels import fused
from tests.kernels.fused import DTYPES, check, draw, module_of

fused.require_device()
from sana_core.kernels.fused.gated_depthwise import gated_depthwise  # noqa: E402


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """The interpreter's time goes with the steps of a program: strips of three rows, as many programs as there are."""
    if fused.INTERPRETED:
        monkeypatch.setattr(module_of(gated_depthwise), "STRIP", 3)


def inputs(batch, channels, height, width, dtype=torch.float32):
    """x [B, 2C, h, w] as a view of tokens, weight and bias."""
    x = draw(batch, height * width, 2 * channels, dtype=dtype).transpose(1, 2).unflatten(2, (height, width))
    return [x, draw(2 * channels, 1, 3, 3, dtype=dtype, seed=1) / 3, draw(2 * channels, dtype=dtype, seed=2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, channels, height, width", [(1, 5, 1, 1), (2, 70, 4, 3), (1, 16, 3, 17)])
def test_result_and_gradients(poisoned, batch, channels, height, width, dtype):
    found = check("gated_depthwise", gated_depthwise, inputs(batch, channels, height, width, dtype))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_inputs_of_any_layout(poisoned):
    x, weight, bias = inputs(2, 6, 4, 5)
    gradient = draw(1, 1, 1, 1).expand(2, 6, 4, 5)
    check("gated_depthwise", gated_depthwise, [x.contiguous(), weight, bias], gradient=gradient)
