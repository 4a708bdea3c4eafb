"""Weights in 8 bits sample on a real server."""

import pytest

from sana_core.checkpoint import save_transformer
from tests import quantized, tiny
from tests.comfy.graphs import empty, encode, k_sample, latent_of, save_latent
from tests.comfy.server import Graph

pytestmark = pytest.mark.server


@pytest.fixture
def sampled(server):
    def sampled(file, dtype="auto"):
        graph = Graph()
        model = graph.add("SanaDiffusionModelLoader", model_name=file, variant="auto", dtype=dtype)
        clip = graph.add("SanaTextEncoderLoader", text_encoder_name="tiny.safetensors", dtype="auto")
        save_latent(graph, k_sample(graph, model, encode(graph, clip), encode(graph, clip, ""), empty(graph)))
        return latent_of(server, graph)

    return sampled


def error(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_fewer_digits_are_further_off(sampled):
    whole = sampled("tiny.safetensors")
    errors = [error(sampled("tiny.safetensors", dtype), whole) for dtype in ("bfloat16", "fp8_e4m3fn", "fp8_e5m2")]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5


def test_scaled_layers_are_what_their_author_multiplied_out(sampled, tiny_models):
    folder = tiny_models / "diffusion_models"
    layers = ["blocks.0.attn.qkv", "blocks.1.cross_attn.proj"]
    model = tiny.transformer()
    model.load_state_dict(quantized.save_quantized(model, folder / "scaled.safetensors", layers))
    save_transformer(model, folder / "multiplied_out.safetensors")
    assert error(sampled("scaled.safetensors"), sampled("multiplied_out.safetensors")) < 1e-5
