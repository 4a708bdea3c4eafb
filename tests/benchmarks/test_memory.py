"""The benchmark of memory counts what the allocator counts."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from tests import tiny
from tests.memory import peak_bytes


def test_tensors_count_while_they_live():
    layer = nn.Linear(8, 8)
    x = torch.zeros(100, 8)
    with torch.no_grad(), memory.TensorWatch(layer) as watch:
        y = layer(x).view(8, 100)  # its input, 3,200 bytes, counts from when it is seen, the weights do not
        assert watch.held == 6_400, "a view is no second tensor"
        z = y + 1
        del y
        assert watch.held == 6_400
        w = z.double()
        assert watch.held == watch.peak == 12_800
        del z, w
        assert (watch.held, watch.peak) == (3_200, 12_800)


@pytest.mark.parametrize("network", ["transformer", "dc_ae"])
def test_it_is_the_allocators_peak(network):
    model = getattr(tiny, network)()
    arguments, work = (torch.randn(1, 32, 12, 12),), getattr(model, "decode", model)
    if network == "transformer":
        arguments += (torch.tensor([500.0]), torch.randn(1, 300, tiny.CHANNELS))
    with torch.no_grad():
        measured = peak_bytes(partial(work, *arguments))
        followed = memory.followed_peak(model, partial(work, *arguments))
    given = sum(tensor.nbytes for tensor in arguments)
    assert 0.8 * measured <= followed - given <= 1.05 * measured, "workspaces of operations are theirs alone"


def test_a_gpu_need_not_be_there():
    with memory.without_computing() as peak:
        stage = memory.sampling_stage("sana-nano", peak)
        whole, tiled = (memory.decoding_stage(1024, peak, tiled) for tiled in (False, True))
    assert stage.weights == 2 * sum(p.numel() for p in nano().parameters())
    assert whole.weights == tiled.weights and whole.work > 2 * tiled.work > 0


def nano():
    with FakeTensorMode():
        return memory.SanaTransformer(memory.TRANSFORMERS["sana-nano"])


def test_the_peaks_are_those_of_the_largest_stage():
    text, sampling, whole, tiles = memory.Stage(50, 1), memory.Stage(30, 4), memory.Stage(6, 20), memory.Stage(6, 2)
    row = memory.Row("a model", 1024, text, sampling, whole, tiles)
    assert row.figures() == (30, 4, 20, 2, 86 + 20, 86 + 4, 51)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["memory", "--measure"])
    assert memory.main() == 1
    assert "finds no usable GPU" in capsys.readouterr().err
