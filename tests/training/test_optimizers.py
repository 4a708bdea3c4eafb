"""Optimisers by name, the schedules, and settings that make no sense."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sana_core.training.config import TrainConfig, differences, fixed_settings, usual_rate
from sana_core.training.optimizers import learning_rate, optimizer_factory, set_rate
from sana_core.training.progress import tensorboard_writer
from tests import tiny

from .micro import run, weights


@pytest.mark.parametrize(
    "name, library",
    [
        ("adamw", "torch"),
        ("adafactor", "torch"),
        ("came", "came_pytorch"),
        ("prodigy", "prodigyopt"),
        ("adamw8bit", "bitsandbytes"),
        ("adamw8bit", "torchao"),
    ],
)
def test_they_train_and_resume(tmp_path, monkeypatch, name, library):
    """With the real libraries; the two 8-bit ones run on a CPU, but are large, and so are not among the tests' own."""
    pytest.importorskip(library)
    if library == "torchao":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = {"optimizer": name, "ema_decay": 0, "learning_rate": usual_rate("lora", name)}
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes minutes
        unbroken = run(tmp_path / "unbroken", **options, steps=4)
        run(tmp_path / "broken", **options, steps=2)
        resumed = run(tmp_path / "broken", **options, steps=4)
    assert all(map(torch.equal, unbroken.parameters(), resumed.parameters()))
    assert 1e-6 < (weights(unbroken) - weights(tiny.transformer())).abs().max() < 1


def test_a_rate_that_is_a_tensor_is_set_in_place():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5


def test_adamw_is_fused():
    optimizer = optimizer_factory("adamw")([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.01)
    assert optimizer.defaults["fused"] and optimizer.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize(
    "name, module, attribute",
    [
        ("adamw8bit", "bitsandbytes", "optim.AdamW8bit"),
        ("adamw8bit", "torchao.optim", "AdamW8bit"),
        ("came", "came_pytorch", "CAME"),
        ("prodigy", "prodigyopt", "Prodigy"),
    ],
)
def test_libraries_are_asked_by_their_names(monkeypatch, name, module, attribute):
    for other in ("bitsandbytes", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, other, None)
    library, calls = ModuleType(module), []
    target = library
    *path, last = attribute.split(".")
    for part in path:
        setattr(target, part, SimpleNamespace())
        target = getattr(target, part)
    setattr(target, last, lambda parameters, **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType(module.split(".")[0]))
    monkeypatch.setitem(sys.modules, module, library)
    optimizer_factory(name)([], 0.5, 0.25)
    assert calls[0]["lr"] == 0.5 and calls[0]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    "name, package",
    [("adamw8bit", "bitsandbytes (or torchao)"), ("came", "came-pytorch"), ("prodigy", "prodigyopt")],
)
def test_a_missing_library_is_named(monkeypatch, name, package):
    for module in ("bitsandbytes", "torchao", "torchao.optim", "came_pytorch", "prodigyopt"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        optimizer_factory(name)
    assert f"pip install {package}" in str(error.value) and repr(name) in str(error.value)


def test_an_unknown_optimizer_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'adam' is unknown, expected one of adamw, "):
        run(tmp_path / "run", optimizer="adam")
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        tensorboard_writer(tmp_path)


def rates(**settings):
    config = TrainConfig(**{"steps": 100, "learning_rate": 2.0, "warmup_steps": 10, **settings})
    return [learning_rate(step, config) for step in range(config.steps)]


def test_schedules():
    constant, linear, cosine = (rates(schedule=name) for name in ("constant", "linear", "cosine"))
    assert constant[0] == pytest.approx(0.2) and constant[9:] == [2.0] * 91
    assert linear[10] == pytest.approx(2.0)
    assert linear[55] == pytest.approx(1.0) and linear[99] == pytest.approx(2 / 90)
    assert cosine[55] == pytest.approx(1.0)
    assert cosine[77] == pytest.approx(1 + math.cos(math.pi * 67 / 90))
    late = rates(schedule="linear", decay_steps=20)
    assert late[80] == 2.0 and late[90] == pytest.approx(1.0) and late[99] == pytest.approx(0.1)
    assert rates(warmup_steps=0)[0] == 2.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a number above 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"precision": "fp16"}, "runs into NaN"),
        ({"precision": "int8"}, "expected one of bf16, fp32"),
        ({"schedule": "cosin"}, "expected one of constant, cosine, linear"),
        ({"decay_steps": -1}, "decay_steps is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 10, "learning_rate": 1e-4, **wrong})


def test_defaults_of_both_kinds_of_training():
    lora, full = TrainConfig.lora(10), TrainConfig.full(10, seed=3)
    assert (lora.learning_rate, lora.max_grad_norm, lora.optimizer) == (1e-4, 1.0, "adamw")
    assert (full.learning_rate, full.max_grad_norm, full.seed) == (2e-5, 0.1, 3)


def test_prodigys_rate_is_a_factor_of_what_it_finds():
    assert TrainConfig.lora(10, optimizer="prodigy").learning_rate == 1
    assert TrainConfig.full(10, optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5


def test_differences_are_listed_by_name():
    saved = fixed_settings(TrainConfig.lora(10), {"rank": 4, "targets": ("a", "b")})
    now = fixed_settings(TrainConfig.lora(99, learning_rate=1), {"rank": 8, "targets": ["a", "b"], "data": "x"})
    assert differences(saved, now) == ["data: 'absent' -> 'x'", "rank: 4 -> 8"]
