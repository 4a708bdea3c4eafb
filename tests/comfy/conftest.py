"""One server for all tests here, and one with ComfyUI's options for half precision."""

import pytest

from tests.comfy.server import Graph, Server
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def start(comfyui, tiny_models, tmp_path_factory):
    servers = []

    def start(*options: str) -> Server:
        server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), ROOT, tiny_models, *options)
        servers.append(server)
        server.wait_until_up()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start) -> Server:
    return start("--cpu")


@pytest.fixture(scope="session")
def half_precision_server(start) -> Server:
    return start("--cpu", "--fp16-vae", "--fp16-text-enc")


@pytest.fixture(scope="module")
def gpu_server(request, comfyui, tiny_models, tmp_path_factory):
    """A server on the GPU with the options that the test names, stopped after its module: they share one GPU."""
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), ROOT, tiny_models, *request.param)
    server.wait_until_up()
    yield server
    server.stop()


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture
def models(graph):
    """MODEL, CLIP and VAE of the tiny model."""
    return (
        graph.add("SanaDiffusionModelLoader", model_name="tiny.safetensors", variant="auto", dtype="auto"),
        graph.add("SanaTextEncoderLoader", text_encoder_name="tiny.safetensors", dtype="auto"),
        graph.add("SanaDCAELoader", vae_name="tiny.safetensors", variant="auto", dtype="auto"),
    )
