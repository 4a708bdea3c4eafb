"""The options that name the tiny model."""

import pytest


@pytest.fixture
def model_options(tiny_models):
    folders = {"transformer": "diffusion_models", "vae": "vae", "text-encoder": "text_encoders"}
    options = [(f"--{name}", str(tiny_models / folder / "tiny.safetensors")) for name, folder in folders.items()]
    return [word for option in options for word in option] + ["--device", "cpu"]
