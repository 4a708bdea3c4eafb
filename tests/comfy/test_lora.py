"""LoRA files on a real server, by the pack's loader and by ComfyUI's."""

import pytest
import torch
from safetensors.torch import save_file

from tests import loras, tiny
from tests.comfy.graphs import finished, latent_of, sample, save_latent

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def files(tiny_models):
    """The same LoRA as diffusers writes it, and fused under the official names, which ComfyUI's loader can map."""
    modules = ["blocks.1.attn.qkv", "blocks.1.attn.proj"]
    (down, up), proj = loras.factors(tiny.transformer(), modules).values()
    block = "transformer_blocks.1.attn1"
    split = {f"{block}.to_{part}": (down, rows) for part, rows in zip("qkv", up.chunk(3), strict=True)}
    folder = tiny_models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(
        {
            key: tensor.clone()
            for key, tensor in loras.dotted(split | {f"{block}.to_out.0": proj}, "transformer.").items()
        },
        folder / "split.safetensors",
    )
    save_file(loras.flat({modules[0]: (down, up), modules[1]: proj}), folder / "fused.safetensors")
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(2, 2)}, folder / "flux.safetensors")


def drawn(server, graph, models, loader, **inputs):
    """The latent that the MODEL gives after a LoRA loader."""
    if loader is None:
        patched = models[0]
    else:
        patched = graph.add(loader, model=models[0], **inputs)
    save_latent(graph, sample(graph, (patched, *models[1:])))
    latent = latent_of(server, graph)
    for node in ("SaveLatent", "SanaSampler", loader):
        graph.remove(node)
    return latent


def test_both_loaders_draw_the_same(server, graph, models, files):
    plain = drawn(server, graph, models, None)
    expected = drawn(server, graph, models, "LoraLoaderModelOnly", lora_name="fused.safetensors", strength_model=0.8)
    scale = plain.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * scale
    for name in ("split.safetensors", "fused.safetensors"):
        latent = drawn(server, graph, models, "SanaLoraLoader", lora_name=name, strength_model=0.8)
        assert (latent - expected).abs().max() < 1e-5 * scale, name


def test_the_node_shows_what_matched(server, graph, models, files):
    loader = graph.add("SanaLoraLoader", model=models[0], lora_name="split.safetensors", strength_model=0.7)
    save_latent(graph, sample(graph, (loader, *models[1:])))
    shown = finished(server, graph).texts[loader[0]]
    assert "8 of 8 keys matched, 4 weights changed" in shown


def test_a_foreign_lora_is_an_error(server, graph, models, files):
    loader = graph.add("SanaLoraLoader", model=models[0], lora_name="flux.safetensors", strength_model=1.0)
    save_latent(graph, sample(graph, (loader, *models[1:])))
    run = server.run(graph)
    assert "it looks like a LoRA for Flux" in run.error["exception_message"]
