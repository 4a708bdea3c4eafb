"""Image to image and inpainting on a real server, with ComfyUI's own mask nodes, against the pipeline."""

import pytest
import torch
from PIL import Image

from sana_core import SanaPipeline
from sana_core.autoencoder import encode_pixels
from sana_core.pictures import to_pixels
from tests import tiny
from tests.comfy.graphs import PROMPT, encode, k_sample, latent_of, sample, save_latent

pytestmark = pytest.mark.server

OPTIONS = {"height": 64, "width": 96, "num_inference_steps": 4, "seed": 7, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture(scope="module")
def picture(server):
    pixels = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(5))
    picture = Image.fromarray((pixels * 255).byte().numpy())
    save_input(server, "picture.png", picture)
    return picture


@pytest.fixture(scope="module")
def mask(server):
    """White on the left third, which is one column of latents."""
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 32, 64))
    save_input(server, "mask.png", mask.convert("RGB"))
    return mask


def save_input(server, name, picture):
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    picture.save(folder / name)


def encoded(graph, models, **changes):
    image = graph.add("LoadImage", image="picture.png")
    return graph.add("SanaDCAEEncode", pixels=image, vae=models[2], **changes)


def masked(graph, models):
    return graph.add("SetLatentNoiseMask", samples=encoded(graph, models), mask=load_mask(graph))


def load_mask(graph):
    return graph.add("LoadImageMask", image="mask.png", channel="red")


def assert_close(latent, expected):
    assert (latent * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()


def test_denoise_is_the_pipelines_strength(server, graph, models, pipe, picture):
    """denoise 0.5 walks the last 4 of 8 steps; so does strength 0.5 of 8 steps."""
    save_latent(graph, sample(graph, models, encoded(graph, models), denoise=0.5))
    expected = pipe(PROMPT, image=picture, strength=0.5, **OPTIONS | {"num_inference_steps": 8})
    assert_close(latent_of(server, graph), expected)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_noise_mask_is_the_pipelines_mask(server, graph, models, pipe, picture, mask, denoise):
    save_latent(graph, sample(graph, models, masked(graph, models), denoise=denoise))
    options = OPTIONS | {"num_inference_steps": int(4 / denoise), "strength": denoise}
    assert_close(latent_of(server, graph), pipe(PROMPT, image=picture, mask=mask, **options))


def test_differential_diffusion_takes_a_mask_for_a_mask(server, graph, models, pipe, picture, mask):
    """Its thresholds change nothing about black and white."""
    patched = graph.add("DifferentialDiffusion", model=models[0])
    save_latent(graph, sample(graph, (patched, *models[1:]), masked(graph, models)))
    assert_close(latent_of(server, graph), pipe(PROMPT, image=picture, mask=mask, **OPTIONS))


def test_encode_for_inpaint_keeps_what_the_mask_leaves(server, graph, models, pipe, picture, mask):
    image = graph.add("LoadImage", image="picture.png")
    latent = graph.add("VAEEncodeForInpaint", pixels=image, vae=models[2], mask=load_mask(graph), grow_mask_by=0)
    save_latent(graph, sample(graph, models, latent))
    pixels = to_pixels(picture, 64, 96)
    pixels[..., :32] = 0.5  # what is to be drawn anew is hidden from the encoder
    with torch.no_grad():
        hidden = encode_pixels(pipe.vae, pixels)
    assert_close(latent_of(server, graph), pipe(PROMPT, image=hidden, mask=mask, **OPTIONS))


def test_the_stock_sampler_inpaints(server, graph, models, pipe, picture, mask):
    positive, negative = encode(graph, models[1]), encode(graph, models[1], "")
    save_latent(graph, k_sample(graph, models[0], positive, negative, masked(graph, models)))
    latent = latent_of(server, graph) * 0.41407
    with torch.no_grad():
        known = encode_pixels(pipe.vae, to_pixels(picture, 64, 96))
    torch.testing.assert_close(latent[..., 1:], known[..., 1:], atol=1e-5, rtol=1e-5)
    assert (latent[..., 0] - known[..., 0]).abs().max() > 0.1
