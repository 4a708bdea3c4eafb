"""The loop on a linear model: it learns, resumes bit-exactly, and survives a gradient that is not finite."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from sana_core.training.loop import TrainConfig, learning_rate, train
from sana_core.training.state import load_newest_state

CONFIG = TrainConfig(steps=40, learning_rate=0.05, warmup_steps=5, decay_steps=20, save_every=10, log_every=5)


def linear_model():
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def loss_of(model, step, generator):
    x = torch.randn(16, 4, generator=generator)
    return (model(x)[:, 0] - x.sum(1)).square().mean()


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_learns(tmp_path):
    model = linear_model()
    before = loss_of(model, 0, torch.Generator().manual_seed(9)).item()
    average = train(model, loss_of, CONFIG, tmp_path)
    assert loss_of(model, 0, torch.Generator().manual_seed(9)).item() < before / 10
    assert not torch.equal(weights(average), weights(model))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(5, 45, 5))


class Killed(BaseException):
    pass


def test_resumed_run_equals_the_unbroken_one(tmp_path):
    unbroken = linear_model()
    unbroken_average = train(unbroken, loss_of, CONFIG, tmp_path / "unbroken")

    def killed_at_27(model, step, generator):
        if step == 27:
            raise Killed
        return loss_of(model, step, generator)

    with pytest.raises(Killed):
        train(linear_model(), killed_at_27, CONFIG, tmp_path / "broken")
    resumed = linear_model()
    resumed_average = train(resumed, loss_of, CONFIG, tmp_path / "broken")
    assert torch.equal(weights(resumed), weights(unbroken))
    assert torch.equal(weights(resumed_average), weights(unbroken_average))


def test_finished_run_is_only_read(tmp_path):
    model = linear_model()
    train(model, loss_of, CONFIG, tmp_path)
    again = linear_model()
    train(again, loss_of, CONFIG, tmp_path)
    assert torch.equal(weights(again), weights(model))


def test_step_without_a_finite_gradient_is_left_out(tmp_path, caplog):
    def sometimes_nan(model, step, generator):
        return loss_of(model, step, generator) * (float("nan") if step == 3 else 1)

    model = linear_model()
    train(model, sometimes_nan, CONFIG, tmp_path)
    assert torch.isfinite(weights(model)).all()
    assert "Step 3 left out" in caplog.text


def test_what_on_save_measures_is_logged(tmp_path):
    train(linear_model(), loss_of, CONFIG, tmp_path, lambda average, step: {"measured": step / 2})
    measured = [json.loads(line).get("measured") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [value for value in measured if value is not None] == [5, 10, 15, 20]


def test_learning_rate_warms_up_and_decays():
    assert learning_rate(0, CONFIG) == pytest.approx(0.01)
    assert learning_rate(10, CONFIG) == pytest.approx(0.05)
    assert learning_rate(30, CONFIG) == pytest.approx(0.025)
    assert learning_rate(39, CONFIG) == pytest.approx(0.0025)


ENDLESS = """
import sys, torch
from pathlib import Path
from sana_core.training.loop import TrainConfig, train

def loss_of(model, step, generator):
    return model(torch.randn(8, 400, generator=generator)).square().mean()

train(torch.nn.Linear(400, 400), loss_of, TrainConfig(10**6, 1e-3, save_every=2), Path(sys.argv[1]))
"""


def test_killed_at_any_moment_leaves_a_state(tmp_path):
    """A run that saves all the time is killed; what it left is complete."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path], stderr=subprocess.DEVNULL)
    try:
        while not len(list(tmp_path.glob("step_*[0-9]"))) >= 2:
            assert process.poll() is None, "the run ended by itself"
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    state = load_newest_state(tmp_path)
    assert state["step"] % 2 == 0
    assert state["optimizer"]["state"][0]["step"].item() == state["step"]
