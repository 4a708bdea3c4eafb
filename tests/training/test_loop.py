"""The loop on a micro transformer: what is equal to what, and what happens when something goes wrong."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from sana_core.kernels import REFERENCE
from sana_core.models.sana import SanaTransformer
from sana_core.training.loop import Hooks, TrainingDiverged, train
from sana_core.training.lora import add_adapters
from sana_core.training.loss import sample_generators
from sana_core.training.stop import Stopped
from sana_core.training.validation import validation_loss
from tests import tiny

from . import micro
from .micro import run, weights


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learns(tmp_path):
    batches = [micro.Samples(8).batch(0)]
    model = tiny.transformer()
    before = validation_loss(model, batches)["validation_loss"]

    class OneBatch(micro.Samples):
        def batch(self, step):
            return super().batch(0)

    config = micro.config(steps=60, learning_rate=1e-2, ema_decay=0.8, save_every=60)
    average = train(model, OneBatch(8), micro.objective(), config, tmp_path)
    after = validation_loss(average, batches)
    assert after["validation_loss"] < 0.7 * before
    assert after["validation_loss"] == pytest.approx(
        sum(after[f"validation_loss_{sigma}"] for sigma in (0.1, 0.3, 0.5, 0.7, 0.9)) / 5
    )
    assert after == validation_loss(average, batches)


def test_accumulation_equals_the_large_batch(tmp_path):
    settings = {"ema_decay": 0, "optimizer": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.5}
    large = run(tmp_path / "large", size=8, **settings)
    parts = run(tmp_path / "parts", size=2, accumulation=4, **settings)
    assert (weights(large) - weights(parts)).abs().max() < 1e-6
    assert (weights(large) - weights(tiny.transformer())).abs().max() > 1e-3
    for one, other in zip(records(tmp_path / "large"), records(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def gradients(objective, model):
    batch = micro.Samples(4).batch(0)
    objective(model, batch, sample_generators(0, 0, range(4))).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_recomputed_blocks_have_the_same_gradient():
    plain = gradients(micro.objective(), tiny.transformer(qk_norm=True))
    recomputed = gradients(micro.objective(recompute=True), tiny.transformer(qk_norm=True))
    assert all(map(torch.equal, plain, recomputed))


def test_recomputed_blocks_run_twice(monkeypatch):
    calls = []

    def counted(q, *others):
        calls.append(q.shape)
        return REFERENCE.linear_attention(q, *others)

    model = SanaTransformer(tiny.TRANSFORMER, kernels=replace(REFERENCE, linear_attention=counted))
    gradients(micro.objective(recompute=True), tiny.filled(model))
    assert len(calls) == 2 * tiny.TRANSFORMER.depth


def test_linear_attention_stays_float32_under_autocast():
    """Sums that bfloat16 cannot hold: 4096 keys of 1 sum to 4096, and one more is lost in 8 bits."""
    q = torch.ones(1, 4097, 1, 2, dtype=torch.bfloat16)
    v = torch.linspace(1, 2, 4097).reshape(1, 4097, 1, 1).expand(-1, -1, -1, 2).contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        out = REFERENCE.linear_attention(q, q, v, 1e-8)
    assert out.dtype == torch.float32
    assert (out - 1.5).abs().max() < 1e-5


def test_autocast_keeps_weights_gradients_and_loss_float32(tmp_path):
    seen = []

    def look(model, step):
        seen.append({parameter.dtype for parameter in model.parameters()})
        return {}

    exact = run(tmp_path / "fp32", steps=3, precision="fp32")
    rounded = run(tmp_path / "bf16", steps=3, precision="bf16", hooks=Hooks(on_save=look))
    assert seen == [{torch.float32}] * 2
    assert 0 < (weights(exact) - weights(rounded)).abs().max() < 0.02


def test_resumed_run_equals_the_unbroken_one(tmp_path):
    unbroken = run(tmp_path / "unbroken")

    class Killed(BaseException):
        pass

    class Breaks(micro.Samples):
        def batch(self, step):
            if step == 5:
                raise Killed
            return super().batch(step)

    with pytest.raises(Killed):
        train(tiny.transformer(), Breaks(micro.GLOBAL_BATCH), micro.objective(), micro.config(), tmp_path / "broken")
    resumed = run(tmp_path / "broken")
    assert torch.equal(weights(resumed), weights(unbroken))
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("unbroken", "broken")]
    assert losses[0] == losses[1]


def test_finished_run_is_only_read(tmp_path):
    first = run(tmp_path)
    assert torch.equal(weights(run(tmp_path)), weights(first))
    assert len(records(tmp_path)) == 6


class Poisoned(micro.Samples):
    """Some of its batches hold a NaN."""

    def __init__(self, steps):
        super().__init__(2)
        self.poisoned = steps

    def batch(self, step):
        batch = super().batch(step)
        return replace(batch, latents=batch.latents * (float("nan") if step in self.poisoned else 1))


def test_steps_that_are_not_finite_are_left_out_and_named(tmp_path, caplog):
    model = train(tiny.transformer(), Poisoned({2, 3}), micro.objective(), micro.config(steps=5), tmp_path)
    assert torch.isfinite(weights(model)).all()
    assert "Step 2 left out" in caplog.text and "Step 3 left out" in caplog.text
    assert "picture 6.png (t " in caplog.text


def test_three_such_steps_in_a_row_end_the_run_and_keep_the_last_good_state(tmp_path):
    config = micro.config(steps=9, save_every=1, ema_decay=0)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*picture 8.png \(t \d+\), picture 9.png \(t "):
        train(tiny.transformer(), Poisoned({2, 3, 4}), micro.objective(), config, tmp_path)
    good = train(tiny.transformer(), Poisoned(set()), micro.objective(), replace(config, steps=2), tmp_path / "good")
    resumed = train(tiny.transformer(), Poisoned(set()), micro.objective(), replace(config, steps=4), tmp_path)
    assert torch.equal(weights(good), weights(run(tmp_path / "good", steps=2, size=2, save_every=1, ema_decay=0)))
    assert torch.isfinite(weights(resumed)).all()


def test_other_settings_are_refused_with_what_changed(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="ema_decay: 0.9 -> 0.5\n  seed: 0 -> 3"):
        run(tmp_path, steps=4, seed=3, ema_decay=0.5)
    run(tmp_path, steps=3, learning_rate=1e-4, keep=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_saving(tmp_path, number):
    def send(progress):
        if progress.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, hooks=Hooks(on_step=send))
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert (tmp_path / f"step_0000000{stopped.value.step}").is_dir()
    assert torch.equal(weights(run(tmp_path)), weights(run(tmp_path / "unbroken")))


def test_an_exception_out_of_on_step_ends_the_run_after_saving(tmp_path):
    class Interrupted(BaseException):  # as ComfyUI's
        pass

    def cancel(progress):
        if progress.step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path, hooks=Hooks(on_step=cancel))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_hooks_are_called_when_they_are_due(tmp_path):
    called = []
    hooks = Hooks(
        on_step=lambda progress: called.append(("step", progress.step)),
        on_save=lambda model, step: called.append(("save", step)) or {"measured": step / 2},
        validate=lambda model: called.append(("validate",)) or {"validation_loss": 1.0},
        sample=lambda model, step: called.append(("sample", step)),
        export=lambda model, step, folder: (folder / "picture.txt").write_text(str(step)),
    )
    run(tmp_path, steps=5, hooks=hooks, validate_every=3, sample_every=4)
    assert [call[1] for call in called if call[0] == "step"] == [1, 2, 3, 4, 5]
    assert [call[1] for call in called if call[0] == "save"] == [2, 4, 5]
    assert [call[1] for call in called if call[0] == "sample"] == [4, 5]
    assert called.count(("validate",)) == 2
    assert (tmp_path / "step_00000005" / "picture.txt").read_text() == "5"
    assert [record["measured"] for record in records(tmp_path) if "measured" in record] == [1, 2, 2.5]
    assert {"loss", "smoothed_loss", "learning_rate", "grad_norm", "images_per_second", "seconds_left"} <= records(
        tmp_path
    )[0].keys()


def test_hooks_see_the_average_and_leave_the_weights(tmp_path):
    seen = {}
    look = Hooks(on_save=lambda model, step: seen.update({step: weights(model)}) or {})
    average = run(tmp_path, hooks=look)
    assert torch.equal(seen[6], weights(average))
    raw = torch.load(tmp_path / "step_00000006" / "weights.pt", weights_only=True)["model"]
    assert not torch.equal(torch.cat([raw[name].flatten() for name, _ in average.named_parameters()]), seen[6])


def test_a_lora_is_trained_and_saved_without_the_frozen_weights(tmp_path):
    model = tiny.transformer().to(torch.bfloat16)
    frozen = weights(model)
    add_adapters(model, 2)
    run(tmp_path, model, precision="bf16")
    assert torch.equal(weights(tiny.transformer().to(torch.bfloat16)), frozen)
    saved = torch.load(tmp_path / "step_00000006" / "weights.pt", weights_only=True)["model"]
    assert saved.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any(value.abs().max() > 0 for name, value in saved.items() if ".up." in name)


def test_a_lora_beside_bfloat16_weights_is_validated(tmp_path):
    model, losses = tiny.transformer().to(torch.bfloat16), []
    add_adapters(model, 2)
    hooks = Hooks(validate=lambda model: losses.append(validation_loss(model, [micro.Samples(2).batch(0)])) or {})
    run(tmp_path, model, steps=2, precision="bf16", validate_every=1, learning_rate=0.1, hooks=hooks)
    assert len(losses) == 2 and losses[0]["validation_loss"] != losses[1]["validation_loss"]


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainable weights are bfloat16.*float32"):
        run(tmp_path, tiny.transformer().to(torch.bfloat16))
    with pytest.raises(ValueError, match="no trainable weights"):
        run(tmp_path, tiny.transformer().requires_grad_(False))


def test_blocks_are_compiled_where_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    run(tmp_path, steps=1, compile=True)
    assert compiled == ["SanaBlock"] * tiny.TRANSFORMER.depth
