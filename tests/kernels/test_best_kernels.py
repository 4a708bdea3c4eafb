"""Which kernels a model gets: fused ones only where a launch has shown that they run."""

import importlib.util
import logging

import pytest
import torch

from sana_core import kernels
from sana_core.kernels import REFERENCE, best_kernels
from sana_core.kernels.processor import PROCESSOR


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a Hopper GPU; the probe is the test's."""
    package = pytest.importorskip("triton") and importlib.import_module("sana_core.kernels.fused")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(package, "check_on", lambda device: None)
    kernels._probed_kernels.cache_clear()
    yield package
    kernels._probed_kernels.cache_clear()


def test_a_cpu_gets_the_processors_kernels():
    assert best_kernels("cpu") is PROCESSOR
    assert best_kernels(torch.device("meta")) is REFERENCE


def test_a_gpu_gets_the_fused_kernels(gpu):
    assert best_kernels("cuda") is gpu.FUSED
    assert best_kernels(torch.device("cuda", 1)) is gpu.FUSED


def test_without_triton_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert best_kernels("cuda") is REFERENCE


def test_an_older_gpu_or_another_makers_gets_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert best_kernels("cuda") is REFERENCE
    monkeypatch.setattr(torch.version, "cuda", None)
    assert best_kernels("cuda") is REFERENCE


def test_a_failed_probe_warns_once_and_falls_back(gpu, monkeypatch, caplog):
    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "check_on", fail)
    with caplog.at_level(logging.WARNING):
        assert best_kernels("cuda") is REFERENCE
        assert best_kernels("cuda:0") is REFERENCE
    assert [record.message for record in caplog.records] == [
        "The Triton kernels do not run here (RuntimeError: Failed to find C compiler); PyTorch's do."
    ]
