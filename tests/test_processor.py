"""The processor's number format, in both answers of the probe, and its threads under a container's limit."""

import pytest
import torch

from sana_core import SanaPipeline, processor
from tests import tiny


@pytest.fixture
def answers(monkeypatch):
    """Sets what the probe finds: whether there is AMX."""

    def answer(amx):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        processor.multiplies_bfloat16.cache_clear()

    yield answer
    processor.multiplies_bfloat16.cache_clear()


def test_a_torch_without_the_probe_is_taken_for_a_no(monkeypatch, answers):
    answers(True)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not processor.multiplies_bfloat16()


@pytest.mark.parametrize("native", [True, False])
def test_only_large_networks_that_know_it_get_bfloat16(answers, native):
    answers(native)
    large = processor.LEAST_WEIGHTS
    assert processor.fast_dtype(large) == (torch.bfloat16 if native else torch.float32)
    assert processor.fast_dtype(large - 1) == torch.float32
    assert processor.fast_dtype(large, torch.float16) == torch.float32
    assert processor.count_weights(torch.nn.Linear(3, 4)) == 16


def dtypes(pipe):
    return pipe.transformer.dtype, next(pipe.vae.parameters()).dtype, pipe.text_encoder.dtype


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_the_pipeline_on_a_processor(answers, files, monkeypatch, native, large):
    answers(native)
    monkeypatch.setattr(processor, "LEAST_WEIGHTS", 0 if large else 10**12)
    pipe = SanaPipeline.from_files(**files, device="cpu")
    assert dtypes(pipe) == (torch.bfloat16 if native and large else torch.float32,) * 3
    drawn = pipe("a red cat", num_inference_steps=1, output_type="latent", seed=0)
    assert drawn.isfinite().all()


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_was_asked_for_stays_and_its_price_is_said(answers, files, caplog, native):
    answers(native)
    pipe = SanaPipeline.from_files(**files, device="cpu", dtype=torch.bfloat16)
    assert dtypes(pipe) == (torch.bfloat16,) * 3
    assert ("emulates bfloat16" in caplog.text) is not native


def test_what_was_trained_in_float16_is_float32(answers, files, tmp_path, monkeypatch):
    from sana_core.checkpoint import save_transformer

    answers(True)
    monkeypatch.setattr(processor, "LEAST_WEIGHTS", 0)
    save_transformer(tiny.transformer(dtype="float16"), tmp_path / "half.safetensors")
    pipe = SanaPipeline.from_files(**files | {"transformer": tmp_path / "half.safetensors"}, device="cpu")
    assert dtypes(pipe) == (torch.float32,) * 3


@pytest.mark.parametrize(
    "files, threads",
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "800000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu.max": "nonsense\n"}, 6),
        ({}, 6),
    ],
)
def test_threads_under_a_containers_limit(tmp_path, monkeypatch, files, threads):
    """Of six cores; fewer threads, and never more than were asked for."""
    found = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    processor.limit_threads(tmp_path)
    assert found[-1] == threads
