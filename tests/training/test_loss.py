"""The objective against a calculation by hand."""

import pytest
import torch

from sana_core.training.loss import drop_captions, flow_matching_loss, sample_sigmas


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_are_logit_normal_on_the_grid_before_the_shift(shift):
    sigmas = sample_sigmas(20000, shift, generator())
    base = sigmas / (shift - (shift - 1) * sigmas)  # the shift undone
    assert torch.allclose(base * 1000, (base * 1000).round(), atol=2e-3)
    assert 0 <= sigmas.min() and sigmas.max() < 1
    logits = torch.logit((base + 0.0005).double())
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03


def test_loss_and_gradient_equal_the_hand_calculation():
    """For the model v = w * x_t + timestep / 1000, with x_t, target and their derivative written out."""
    x0, noise = torch.randn(2, 3, 2, 2, generator=generator(1)), torch.randn(2, 3, 2, 2, generator=generator(2))
    sigma = torch.tensor([0.2504, 0.9])
    weight = torch.tensor(0.7, requires_grad=True)
    seen = []

    def model(x, timestep):
        seen.append(timestep)
        return weight * x + timestep[:, None, None, None] / 1000

    loss = flow_matching_loss(model, x0, noise, sigma)
    loss.backward()
    level = sigma.double().reshape(2, 1, 1, 1)
    x_t = (1 - level) * x0.double() + level * noise.double()
    error = 0.7 * x_t + torch.tensor([250.0, 900.0]).double().reshape(2, 1, 1, 1) / 1000 - (noise - x0).double()
    assert seen[0].tolist() == [250.0, 900.0]
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert weight.grad.item() == pytest.approx((2 * error * x_t).mean().item(), rel=1e-5)


def test_dropped_captions_become_the_null_caption_with_its_mask():
    embeds, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    null, null_mask = torch.zeros(3, 4), torch.tensor([True, False, False])
    dropped = torch.tensor([False, True])
    embeds, mask = drop_captions(embeds, mask, null, null_mask, dropped)
    assert embeds.mean((1, 2)).tolist() == [1, 0]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
