"""Two processes train as one does: with a copy of the model each, and with the model shared out. Also when killed."""

import json
import multiprocessing
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

from . import micro

PROGRAM = str(Path(__file__).with_name("micro.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train_in_two_processes(folder, jobs):
    """All of the jobs in one group of processes: starting one takes longer than a job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*TORCHRUN, PROGRAM, folder / "jobs.json"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr


def trained(folder):
    return torch.load(folder / "trained.pt", weights_only=True)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of six steps, by name, of which "grown" was begun by one process and "shrunk" is left to one to end."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        micro.job(folder / "alone", 6, "sgd")
        micro.job(folder / "grown", 3, "sgd")
    jobs = [
        ("copies", 6, "sgd", False),
        ("shared out", 6, "sgd", True),
        ("grown", 6, "sgd", False),
        ("shrunk", 3, "sgd", False),
        ("unbroken", 6, "adamw", True),
        ("broken", 3, "adamw", True),
        ("broken", 6, "adamw", True),
        ("left to one", 3, "sgd", True),
    ]
    train_in_two_processes(folder, [(str(folder / name), *rest) for name, *rest in jobs])
    return folder


@pytest.mark.parametrize("name", ["copies", "shared out", "grown"])
def test_two_processes_train_as_one(folder, name):
    assert difference(trained(folder / name), trained(folder / "alone")) < 1e-6
    assert losses(folder / name) == pytest.approx(losses(folder / "alone"), abs=1e-6)
    assert len(losses(folder / name)) == 6


@pytest.mark.parametrize("name", ["shrunk", "left to one"])  # by two with copies, and by two that shared it out
def test_one_process_goes_on_where_two_were(folder, monkeypatch, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    micro.job(folder / name, 6, "sgd")
    assert difference(trained(folder / name), trained(folder / "alone")) < 1e-6
    assert losses(folder / name) == pytest.approx(losses(folder / "alone"), abs=1e-6)


def test_a_shared_out_run_resumes_exactly(folder):
    assert difference(trained(folder / "broken"), trained(folder / "unbroken")) == 0


def test_copies_are_not_read_by_those_that_share(folder):
    group = FSDP.__new__(FSDP)
    with pytest.raises(ValueError, match="go on with it without --shard"):
        group.load(folder / "alone" / "step_00000006", {}, None, None)


@pytest.fixture(scope="module")
def start():
    """Starts a job in a process of its own, forked off one that has imported everything and done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([micro.__name__])

    def start(*arguments):
        process = context.Process(target=micro.job, args=arguments)
        process.start()
        return process

    return start


def killed_run(start, folder, steps, kills, seed):
    """Trains with SIGKILL at random moments; returns how many of the processes were killed."""
    rng, killed = random.Random(seed), 0
    while True:
        before = set(folder.glob("step_*"))
        process = start(folder, steps, "adamw")
        if killed < kills:
            while process.is_alive() and set(folder.glob("step_*")) <= before:  # it must get forward, too
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.25))
            process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return killed
        killed += 1


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_bit_equal(tmp_path, start, kills):
    steps = 30 * kills
    unbroken = start(tmp_path / "unbroken", steps, "adamw")
    assert killed_run(start, tmp_path / "killed", steps, kills, seed=kills) == kills
    unbroken.join()
    assert difference(trained(tmp_path / "killed"), trained(tmp_path / "unbroken")) == 0
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
