"""The objective against a calculation by hand."""

from types import SimpleNamespace

import pytest
import torch

from sana_core.training.batch import Batch
from sana_core.training.loss import (
    FlowMatching,
    draw_normal,
    drop_captions,
    flow_matching_errors,
    sample_generators,
    sigmas_of,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_are_logit_normal_on_the_grid_before_the_shift(shift):
    sigmas = sigmas_of(torch.randn(20000, generator=generator()), shift)
    base = sigmas / (shift - (shift - 1) * sigmas)  # the shift undone
    assert torch.allclose(base * 1000, (base * 1000).round(), atol=2e-3)
    assert 0 <= sigmas.min() and sigmas.max() < 1
    logits = torch.logit((base + 0.0005).double())
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03


def test_loss_and_gradient_equal_the_hand_calculation():
    """For the model v = w * x_t + timestep / 1000, with x_t, target and their derivative written out, in float64."""
    x0 = torch.randn(2, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(2, 3, 2, 2, generator=generator(2), dtype=torch.float64)
    weight = torch.tensor(0.7, requires_grad=True, dtype=torch.float64)
    seen = []

    def model(x, timestep):
        seen.append(timestep)
        return weight * x + timestep[:, None, None, None] / 1000

    sigma = torch.tensor([0.2504, 0.9006], dtype=torch.float64)
    loss = flow_matching_errors(model, x0, noise, sigma).mean()
    loss.backward()
    expected, slope = 0.0, 0.0
    for row, (level, timestep) in enumerate([(0.2504, 250), (0.9006, 900)]):
        for clean, dirt in zip(x0[row].flatten().tolist(), noise[row].flatten().tolist(), strict=True):
            x_t = (1 - level) * clean + level * dirt
            error = 0.7 * x_t + timestep / 1000 - (dirt - clean)
            expected += error**2 / 24
            slope += 2 * error * x_t / 24
    assert seen[0].tolist() == [250.0, 900.0]
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    assert weight.grad.item() == pytest.approx(slope, rel=1e-13)


def test_dropped_captions_become_the_null_caption_with_its_mask():
    embeds, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    null, null_mask = torch.zeros(3, 4), torch.tensor([True, False, False])
    dropped = torch.tensor([False, True])
    embeds, mask = drop_captions(embeds, mask, null, null_mask, dropped)
    assert embeds.mean((1, 2)).tolist() == [1, 0]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def batch_of(count, length=3):
    mask = torch.ones(count, length, dtype=torch.bool)
    names = tuple(f"{number}.png" for number in range(count))
    return Batch(torch.randn(count, 2, 2, 2, generator=generator()), torch.ones(count, length, 4), mask, names)


class Recorder:
    """A model that remembers what it was called with."""

    def __call__(self, x, timestep, embeds, mask, recompute):
        self.call = SimpleNamespace(x=x, timestep=timestep, embeds=embeds, mask=mask, recompute=recompute)
        return torch.zeros_like(x)


def test_a_tenth_of_the_captions_is_dropped_with_the_null_captions_mask():
    model, batch = Recorder(), batch_of(3000)
    FlowMatching(3.0, torch.zeros(1, 4))(model, batch, sample_generators(0, 0, range(3000)))
    dropped = model.call.embeds[:, 0, 0] == 0
    assert 0.08 < dropped.float().mean() < 0.12
    assert model.call.mask[dropped].sum(1).unique().tolist() == [1]
    assert model.call.mask[~dropped].sum(1).unique().tolist() == [3]


def test_a_dropped_caption_can_keep_its_mask_as_official_training_has_it():
    model, batch = Recorder(), batch_of(8)
    FlowMatching(3.0, torch.zeros(300, 4), caption_dropout=1, keep_caption_mask=True)(
        model, batch, sample_generators(0, 0, range(8))
    )
    assert model.call.embeds.abs().max() == 0
    assert model.call.mask.all() and model.call.mask.shape == (8, 3)
    with pytest.raises(ValueError, match="1 tokens and a caption 3"):
        FlowMatching(3.0, torch.zeros(1, 4), keep_caption_mask=True)(model, batch, sample_generators(0, 0, range(8)))


def test_a_null_caption_longer_than_the_batchs_lengthens_them():
    model, batch = Recorder(), batch_of(8)
    FlowMatching(3.0, torch.zeros(5, 4), caption_dropout=0)(model, batch, sample_generators(0, 0, range(8)))
    assert model.call.mask.tolist() == [[True] * 3 + [False] * 2] * 8


def test_each_sample_draws_for_itself():
    together = draw_normal((2, 2), sample_generators(1, 5, range(4)))
    apart = [draw_normal((2, 2), sample_generators(1, 5, [number]))[0] for number in range(4)]
    assert torch.equal(together, torch.stack(apart))
    assert len({row.sum().item() for row in together}) == 4
    assert not torch.equal(together, draw_normal((2, 2), sample_generators(1, 6, range(4))))
    assert not torch.equal(together, draw_normal((2, 2), sample_generators(2, 5, range(4))))


def test_the_description_names_pictures_and_the_timesteps_that_the_model_saw():
    model, batch = Recorder(), batch_of(2)
    objective = FlowMatching(4.0, torch.zeros(1, 4))
    objective(model, batch, sample_generators(0, 7, range(2)))
    first, second = (int(t) for t in model.call.timestep)
    described = objective.describe(batch, sample_generators(0, 7, range(2)))
    assert described == f"0.png (t {first}), 1.png (t {second})"


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"shift": 3.0, "caption_dropout": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        FlowMatching(null_embeds=torch.zeros(1, 4), **wrong)
