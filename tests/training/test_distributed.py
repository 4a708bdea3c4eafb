"""Two processes train as one does: with a copy of the model each, and with the model shared out. Also when killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sana_core.training.distributed import FSDP, Single, from_environment
from sana_core.training.lora import add_adapters
from tests import tiny

PROGRAM = str(Path(__file__).with_name("micro.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(folder, steps, *options, processes=1, optimizer="sgd"):
    start = [*TORCHRUN, f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    command = [*start, PROGRAM, folder, str(steps), optimizer, *options]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "trained.pt", weights_only=True)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(folder, 6), losses(folder)


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["copies", "shared out"])
def test_two_processes_train_as_one(tmp_path, alone, options):
    trained = train(tmp_path, 6, *options, processes=2)
    assert difference(trained, alone[0]) < 1e-6
    assert losses(tmp_path) == pytest.approx(alone[1], abs=1e-6)
    assert len(alone[1]) == 6


@pytest.mark.parametrize("before, after", [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_resumes_with_another_world_size(tmp_path, alone, before, after):
    train(tmp_path, 3, processes=before)
    assert difference(train(tmp_path, 6, processes=after), alone[0]) < 1e-6
    assert losses(tmp_path) == pytest.approx(alone[1], abs=1e-6)


@pytest.mark.slow
def test_a_shared_out_run_resumes_exactly(tmp_path):
    unbroken = train(tmp_path / "unbroken", 6, "--shard", processes=2, optimizer="adamw")
    train(tmp_path / "broken", 3, "--shard", processes=2, optimizer="adamw")
    assert difference(train(tmp_path / "broken", 6, "--shard", processes=2, optimizer="adamw"), unbroken) == 0


def killed_run(folder, steps, kills, seed):
    """Trains with SIGKILL at random moments; returns how many of the processes were killed, and the result."""
    rng, killed = random.Random(seed), 0
    command = [sys.executable, PROGRAM, folder, str(steps), "adamw"]
    while True:
        before = set(folder.glob("step_*"))
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        if killed < kills:
            while process.poll() is None and set(folder.glob("step_*")) <= before:  # it must get forward, too
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            assert process.returncode == 0
            return killed, torch.load(folder / "trained.pt", weights_only=True)
        killed += 1


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_bit_equal(tmp_path, kills):
    steps = 40 * kills
    unbroken = train(tmp_path / "unbroken", steps, optimizer="adamw")
    killed, trained = killed_run(tmp_path / "killed", steps, kills, seed=kills)
    assert killed == kills
    assert difference(trained, unbroken) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")


def test_sharing_out_needs_several_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(from_environment("cpu")) is Single
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        from_environment("cpu", shard=True)


def test_a_lora_is_not_shared_out():
    model = tiny.transformer()
    add_adapters(model, 2)
    with pytest.raises(ValueError, match="a LoRA is trained without"):
        FSDP.__new__(FSDP).prepare(model)
