"""The benchmark of number formats rounds as ComfyUI's MODEL does, and measures what it says."""

import numpy as np
import pytest
import torch

from benchmarks.precision import PRECISIONS, block_errors, psnr, relative_error, table
from tests import quantized, tiny


@pytest.mark.parametrize("name", ["bfloat16", "float16", "fp8_e4m3fn", "fp8_e5m2"])
def test_rounds_as_the_model_of_comfyui(part, tiny_models, name):
    path = tiny_models / "diffusion_models" / "tiny.safetensors"
    dtype = part("nodes.loaders")._DTYPES.get(name)
    model = part("nodes.adapter").load_model(path, dtype=dtype).model.diffusion_model
    rounded = PRECISIONS[name].apply(tiny.transformer()).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), rounded[key].float()), key


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
def test_scales_as_a_file_with_scaled_layers(tmp_path, name):
    linear = [key for key, module in tiny.transformer().named_modules() if isinstance(module, torch.nn.Linear)]
    dtype = PRECISIONS[name].stored
    expected = quantized.save_quantized(tiny.transformer(), tmp_path / "model.safetensors", linear, dtype=dtype)
    rounded = PRECISIONS[f"{name}, scaled"].apply(tiny.transformer()).state_dict()
    for key, tensor in expected.items():
        assert torch.equal(rounded[key], tensor.bfloat16()), key


def test_errors_are_relative_to_float32():
    assert block_errors(PRECISIONS["float32"]) == {"0.6B": 0, "1.6B": 0}
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 5.0])) == pytest.approx(3 / 5)


def test_psnr():
    one = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(one, one) is None
    assert psnr(one, one + 255) == pytest.approx(0)
    assert psnr(one, one + 51) == pytest.approx(20 * np.log10(5))


def test_table_has_a_row_for_each_precision():
    scores = dict.fromkeys(("background", "place", "subject"), 0.975)
    row = {"scores": scores, "block_errors": {"0.6B": 0.01, "1.6B": 0.02}}
    lines = table({"float32": row, "fp8": row | {"psnr_to_float32": 31.26}}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| float32 | 1.00 % | 2.00 % |  |  | 97.5 % | 97.5 % | 97.5 % |"
    assert lines[3] == "| fp8 | 1.00 % | 2.00 % | 31.3 dB |  | 97.5 % | 97.5 % | 97.5 % |"
