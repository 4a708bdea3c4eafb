"""The fused depthwise convolution against float64 and the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.kernels import fused
from tests.kernels.fused import DTYPES, check, draw, module_of

fused.require_device()
from sana_core.kernels.fused.gated_depthwise import gated_depthwise  # noqa: E402


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """The interpreter's time goes with the steps of a program: strips of two rows."""
    if fused.INTERPRETED:
        monkeypatch.setattr(module_of(gated_depthwise), "STRIP", 2)


def inputs(batch, channels, height, width, dtype=torch.float32):
    """x [B, 2C, h, w] as a view of tokens, weight and bias."""
    x = draw(batch, height * width, 2 * channels, dtype=dtype).transpose(1, 2).unflatten(2, (height, width))
    return [x, draw(2 * channels, 1, 3, 3, dtype=dtype, seed=1) / 3, draw(2 * channels, dtype=dtype, seed=2)]


@pytest.mark.parametrize("batch, channels, height, width", [(1, 5, 1, 1), (2, 7, 3, 4), (1, 16, 3, 17)])
def test_result_and_gradients(poisoned, batch, channels, height, width):
    found = check("gated_depthwise", gated_depthwise, inputs(batch, channels, height, width))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_channels_than_a_program_takes(poisoned, dtype):
    check("gated_depthwise", gated_depthwise, inputs(1, 70, 3, 4, dtype))


def test_inputs_of_any_layout(poisoned):
    x, weight, bias = inputs(2, 6, 2, 3)
    gradient = draw(1, 1, 1, 1).expand(2, 6, 2, 3)
    check("gated_depthwise", gated_depthwise, [x.contiguous(), weight, bias], gradient=gradient)
