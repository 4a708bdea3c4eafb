"""The fused modulation and gated residual against float64 and the reference, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.kernels import fused
from tests.kernels.fused import DTYPES, check, draw, module_of

fused.require_device()
from sana_core.kernels.fused.gated_residual import gated_residual  # noqa: E402
from sana_core.kernels.fused.modulate import modulate  # noqa: E402


def modulation(batch, channels, index, dtype=torch.float32):
    """One sixth [B, 1, C] of the modulation, a view as in the block."""
    return draw(batch, 6, channels, dtype=dtype, seed=3).chunk(6, dim=1)[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, channels", [(1, 1, 7), (2, 13, 96), (3, 5, 300)])
def test_modulate(poisoned, batch, tokens, channels, dtype):
    shift, scale = (modulation(batch, channels, index, dtype) for index in (0, 1))
    check("modulate", modulate, [draw(batch, tokens, channels, dtype=dtype), shift, scale])


def test_modulate_of_a_full_width(poisoned):
    shift, scale = (modulation(1, 2240, index, torch.bfloat16) for index in (0, 1))
    check("modulate", modulate, [draw(1, 9, 2240, dtype=torch.bfloat16) + 8, shift, scale])


def test_modulate_of_channels_that_lie_apart(poisoned):
    x = draw(2, 24, 11).transpose(1, 2)
    gradient = draw(1, 1, 1).expand(2, 11, 24)
    found = check("modulate", modulate, [x, modulation(2, 24, 0), modulation(2, 24, 1)], gradient=gradient)
    assert found[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, channels", [(1, 1, 7), (2, 63, 300), (3, 21, 256)])
def test_gated_residual(poisoned, batch, tokens, channels, dtype):
    x, branch = (draw(batch, tokens, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    check("gated_residual", gated_residual, [x, modulation(batch, channels, 2, dtype), branch])


def test_gated_residual_of_channels_that_lie_apart(poisoned):
    x, branch = draw(2, 24, 11).transpose(1, 2), draw(2, 24, 11, seed=1).transpose(1, 2)
    gradient = draw(1, 1, 1).expand(2, 11, 24)
    check("gated_residual", gated_residual, [x, modulation(2, 24, 0), branch], gradient=gradient)


def test_many_tokens_are_summed_up_in_few_parts(poisoned, monkeypatch):
    """As for a 4K picture: a program takes more rows than one step of it."""
    monkeypatch.setattr(module_of(modulate), "MOST_PARTS", 2)
    monkeypatch.setattr(module_of(modulate), "FEWEST_ROWS", 4)
    monkeypatch.setattr(module_of(gated_residual), "MOST_PARTS", 2)
    x, branch = draw(1, 39, 24), draw(1, 39, 24, seed=1)
    gate, scale = modulation(1, 24, 0), modulation(1, 24, 1)
    check("modulate", modulate, [x, gate, scale])
    check("gated_residual", gated_residual, [x, gate, branch])
