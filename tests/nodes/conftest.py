"""What tests of whole sampling runs share."""

import pytest
import torch

from tests.tiny import conditioning


@pytest.fixture
def sample(comfy, request):
    """Samples with core's Euler in the module's STEPS, from seeds of the positive and negative caption."""
    import comfy.sample

    def run(patcher, positive=1, negative=2):
        noise = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(0))
        return comfy.sample.sample(
            patcher, noise, request.module.STEPS, 4.5, "euler", "normal", conditioning(positive),
            conditioning(negative, 4), torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip

    return run


@pytest.fixture
def as_on_a_gpu(part, monkeypatch):
    """Where no projection is absorbed, so that results are equal to the bit."""
    monkeypatch.setattr(part("sana_core.models.layers").CrossAttention, "_absorbs", lambda *_: False)
