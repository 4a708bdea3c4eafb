"""ComfyUI's options for half precision, in which DC-AE and Gemma-2 overflow, must not reach them."""

import pytest

from tests.comfy.graphs import encode, k_sample, latent_of, pictures_of, sample, save, save_latent

pytestmark = pytest.mark.server


def test_the_options_are_overruled_and_logged(half_precision_server, graph, models):
    server = half_precision_server
    save(graph, graph.add("VAEDecode", samples=sample(graph, models), vae=models[2]))
    (picture,) = pictures_of(server, graph)
    assert picture.getextrema() != ((0, 0), (0, 0), (0, 0))
    log = server.text()
    assert "DC-AE overflows in torch.float16" in log and "DC-AE runs on cpu in torch.float32" in log
    assert "Gemma-2 overflows in torch.float16" in log and "Gemma-2 runs on cpu in torch.float32" in log


def test_the_picture_is_the_same(server, half_precision_server, graph, models):
    latent = k_sample(graph, models[0], encode(graph, models[1]), encode(graph, models[1], ""), {})
    empty = graph.add("SanaEmptyLatent", width=96, height=64, batch_size=1)
    graph.nodes[latent[0]]["inputs"]["latent_image"] = empty
    save_latent(graph, latent)
    assert (latent_of(server, graph) == latent_of(half_precision_server, graph)).all()
