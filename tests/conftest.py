"""What all tests share: reproducible numbers, and ComfyUI, in this process or as a server."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_configure():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tests that train: tiny networks gain nothing from a second, and lose much where others use the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Folder of the ComfyUI to test with: COMFYUI_PATH, or what scripts/comfyui.sh prepared."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui").resolve()
    if not (path / "main.py").is_file():
        reason = f"{path} holds no ComfyUI. Run `bash scripts/test.sh`, or set COMFYUI_PATH."
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(f"*** NOT TESTED WITH COMFYUI *** {reason}")
    return path


@pytest.fixture(scope="session")
def comfy(comfyui):
    """ComfyUI's library in this process, on the CPU, before anything of it was imported."""
    sys.path.insert(0, str(comfyui))  # ahead of the pack, whose folder nodes/ has the name of a core module
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack, loaded by its path under the kind of name that ComfyUI gives it."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def part(pack):
    """Imports a module of the pack by its path in it: part("nodes.adapter")."""
    return lambda path: importlib.import_module(f"{pack.__name__}.{path}")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder in ComfyUI's layout with a complete tiny model; its weights are random."""
    from sana_core.checkpoint import save_controlnet, save_dc_ae, save_text_encoder, save_transformer
    from tests import tiny

    folder = tmp_path_factory.mktemp("models")
    save_transformer(tiny.transformer(), folder / "diffusion_models" / "tiny.safetensors")
    save_transformer(tiny.sprint(), folder / "diffusion_models" / "sprint.safetensors")
    save_controlnet(tiny.controlnet(), folder / "controlnet" / "tiny.safetensors")
    save_dc_ae(tiny.dc_ae(), folder / "vae" / "tiny.safetensors")
    save_text_encoder(tiny.text_encoder(), folder / "text_encoders" / "tiny.safetensors")
    return folder


@pytest.fixture
def files(tiny_models) -> dict[str, Path]:
    """The tiny networks by the names that loaders and the command line have for them."""
    return {
        "transformer": tiny_models / "diffusion_models" / "tiny.safetensors",
        "vae": tiny_models / "vae" / "tiny.safetensors",
        "text_encoder": tiny_models / "text_encoders" / "tiny.safetensors",
    }
