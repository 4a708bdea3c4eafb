"""The fused kernels as one object: in a whole model, what they leave to the reference, and their probe."""

from dataclasses import replace

import pytest
import torch

from sana_core.kernels import REFERENCE
from sana_core.models.sana import SanaTransformer
from tests import tiny
from tests.kernels import fused
from tests.kernels.fused import distance, draw

fused.require_device()
from sana_core.kernels import fused as package  # noqa: E402
from sana_core.kernels.fused import FUSED, check_on  # noqa: E402


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_computes_and_learns_the_same(qk_norm):
    config = replace(tiny.transformer().config, depth=1, qk_norm=qk_norm)
    model, other = (SanaTransformer(config, kernels=one).to(fused.device()) for one in (REFERENCE, FUSED))
    other.load_state_dict(model.state_dict())
    results = []
    for one in (model, other):
        context = draw(1, 5, model.config.caption_channels, seed=1)
        out = one(draw(1, model.config.in_channels, 2, 3), torch.tensor([500.0], device=fused.device()), context)
        gradients = torch.autograd.grad(out.square().sum(), list(one.parameters()))
        results.append([out.detach(), *gradients])
    for expected, found in zip(*results, strict=True):
        assert distance(found, expected.double()) < 1e-4


def test_what_the_kernels_do_not_know_is_left_to_the_reference():
    x, row = draw(1, 4, 16).double(), draw(1, 1, 16, seed=1).double()
    assert torch.equal(FUSED.modulate(x, row, row), REFERENCE.modulate(x, row, row))
    assert torch.equal(FUSED.gated_residual(x, row, x), REFERENCE.gated_residual(x, row, x))
    x, row = x.float(), row.float()
    assert torch.equal(FUSED.modulate(x, x, x), REFERENCE.modulate(x, x, x))  # a shift for every token
    narrow = FUSED.gated_residual(x.bfloat16(), row, x.bfloat16())
    assert narrow.dtype == torch.float32
    with torch.autocast(fused.device(), torch.bfloat16):
        x, weight, bias = draw(1, 4, 2, 2), draw(4, 1, 3, 3), draw(4)
        assert FUSED.gated_depthwise(x, weight, bias).dtype == torch.bfloat16


def test_the_probe_runs_every_kernel(monkeypatch):
    check_on(torch.device(fused.device()))

    def opposite_keys(q, k, v, eps, norms=None, right=FUSED.linear_attention):
        return right(q, k, v, eps, None if norms is None else norms._replace(k_weight=-norms.k_weight))

    for wrong in (
        {"gated_residual": lambda x, gate, branch: x - gate * branch},
        {"linear_attention": opposite_keys},
    ):
        monkeypatch.setattr(package, "FUSED", replace(FUSED, **wrong))
        with pytest.raises(RuntimeError, match=f"{next(iter(wrong))} is off"):
            check_on(torch.device(fused.device()))
