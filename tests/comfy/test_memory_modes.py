"""ComfyUI's ways to manage a GPU's memory: with each, every kind of graph gives what a CPU gives."""

import pytest
import torch
from safetensors.torch import save_file

from tests import loras, tiny
from tests.comfy.graphs import empty, encode, latent_of, pictures_of, sample, save, save_latent

MODES = {"dynamic": (), "lowvram": ("--lowvram",), "highvram": ("--highvram",), "novram": ("--novram",)}
TOLERANCE = 1e-2  # of the largest value: convolutions on a GPU may round float32 to TF32

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.parametrize("gpu_server", MODES.values(), ids=MODES, indirect=True),
]


@pytest.fixture(scope="module")
def lora(tiny_models):
    path = tiny_models / "loras" / "memory_modes.safetensors"
    path.parent.mkdir(exist_ok=True)
    modules = ["blocks.0.attn.qkv", "blocks.1.mlp.inverted_conv.conv"]
    save_file(loras.flat(loras.factors(tiny.transformer(), modules)), path)
    return path.name


def wide_models(graph, name="tiny.safetensors"):
    """MODEL, CLIP and VAE in float32, in which a GPU and a CPU can be compared."""
    return (
        graph.add("SanaDiffusionModelLoader", model_name=name, variant="auto", dtype="float32"),
        graph.add("SanaTextEncoderLoader", text_encoder_name="tiny.safetensors", dtype="float32"),
        graph.add("SanaDCAELoader", vae_name="tiny.safetensors", variant="auto", dtype="float32"),
    )


def plain(graph, lora):
    return sample(graph, wide_models(graph), empty(graph, batch_size=2))


def with_lora(graph, lora):
    model, *rest = wide_models(graph)
    model = graph.add("SanaLoraLoader", model=model, lora_name=lora, strength_model=0.8)
    return sample(graph, (model, *rest))


def with_pag(graph, lora):
    return sample(graph, wide_models(graph), pag_scale=2.0)


def sprint(graph, lora):
    model, clip, _ = wide_models(graph, "sprint.safetensors")
    positive = encode(graph, clip)
    return graph.add(
        "SanaSprintSampler", model=model, positive=positive, latent_image=empty(graph), seed=7, steps=2, guidance=4.5
    )


def image_to_image(graph, lora):
    models = wide_models(graph)
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0x3366CC)
    return sample(graph, models, graph.add("SanaDCAEEncode", pixels=image, vae=models[2]), denoise=0.5)


@pytest.mark.parametrize("kind", [plain, with_lora, with_pag, sprint, image_to_image], ids=lambda kind: kind.__name__)
def test_latents_are_the_cpus(gpu_server, server, graph, lora, kind):
    latent = kind(graph, lora)
    save_latent(graph, latent)
    for seed in (7, 8):  # the second time everything has been on the GPU, and may have left it
        graph.nodes[latent[0]]["inputs"]["seed"] = seed
        expected = latent_of(server, graph)
        assert (latent_of(gpu_server, graph) - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_nano_draws_the_cpus_picture(gpu_server, server, graph):
    """In the formats that ComfyUI chooses for the GPU."""
    models = (
        graph.add("SanaDiffusionModelLoader", model_name="sana_nano.safetensors"),
        graph.add("SanaTextEncoderLoader", text_encoder_name="gemma2_nano.safetensors"),
        graph.add("SanaDCAELoader", vae_name="dc_ae_nano.safetensors"),
    )
    latent = sample(graph, models, empty(graph, 256, 256), steps=20, text="a 🐼 on the left of a red background")
    save(graph, graph.add("SanaDCAEDecode", samples=latent, vae=models[2]))
    (on_gpu,), (on_cpu,) = (pixels_of(each, graph) for each in (gpu_server, server))
    assert (on_gpu - on_cpu).square().mean() < 255**2 / 1e3, "30 dB; bfloat16 alone costs down to 57"


def pixels_of(server, graph):
    return [
        torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float()
        for picture in pictures_of(server, graph)
    ]
