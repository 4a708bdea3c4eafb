"""Sana-Sprint on a real server, beside the base model."""

import pytest

from sana_core import SanaPipeline
from tests import tiny
from tests.comfy.graphs import PROMPT, empty, encode, finished, k_sample, latent_of, save, save_latent

pytestmark = pytest.mark.server


@pytest.fixture
def sprint_models(graph, models):
    return graph.add("SanaDiffusionModelLoader", model_name="sprint.safetensors"), *models[1:]


def sample(graph, models, latent=None, **changes):
    model, clip, _ = models
    inputs = dict(seed=7, steps=2, guidance=4.5) | changes
    latent = latent or empty(graph)
    positive = encode(graph, clip)
    return graph.add("SanaSprintSampler", model=model, positive=positive, latent_image=latent, **inputs)


def test_a_batch_is_the_pipelines(server, graph, sprint_models):
    pipeline = SanaPipeline(tiny.sprint(), tiny.dc_ae(), tiny.text_encoder())
    save_latent(graph, sample(graph, sprint_models, empty(graph, batch_size=2)))
    options = {"seed": 7, "height": 64, "width": 96, "output_type": "latent"}
    expected = pipeline([PROMPT, PROMPT], **options) / 0.41407
    assert (latent_of(server, graph) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_picture_with_previews(server, graph, sprint_models):
    latent = sample(graph, sprint_models, steps=4, seed=100)
    save(graph, graph.add("SanaDCAEDecode", samples=latent, vae=sprint_models[2]))
    run = finished(server, graph)
    assert run.progress[:4] == [1, 2, 3, 4] and run.previews >= 4
    (picture,) = server.images(run)
    assert picture.size == (96, 64) and max(high for _, high in picture.getextrema()) > 0


def test_interrupt_stops_it(server, graph, sprint_models):
    many = " ".join(str(1.5 * (1 - i / 900)) for i in range(901))
    save_latent(graph, sample(graph, sprint_models, timesteps=many, seed=101))
    run = server.run(graph, interrupt_at=3)
    assert run.interrupted and max(run.progress) < 900


def test_image_to_image(server, graph, sprint_models):
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0x3366CC)
    latent = graph.add("SanaDCAEEncode", pixels=image, vae=sprint_models[2])
    save_latent(graph, sample(graph, sprint_models, latent, denoise=0.5))
    assert latent_of(server, graph).isfinite().all()


def test_each_sampler_refuses_the_others_model(server, graph, models, sprint_models):
    positive = encode(graph, models[1])
    save_latent(graph, k_sample(graph, sprint_models[0], positive, positive, empty(graph)))
    assert "Use the Sana Sprint Sampler instead" in server.run(graph).error["exception_message"]
    graph.remove("SaveLatent")
    graph.remove("KSampler")
    save_latent(graph, sample(graph, models))
    assert "needs a Sana-Sprint model, and got another Sana model" in server.run(graph).error["exception_message"]
