"""Graphs of ComfyUI_ExtraModels on a real server that does not have that pack: the same latents as from our nodes."""

import copy

import pytest

from tests import old_graphs
from tests.comfy.graphs import empty, encode, finished, k_sample, latent_of, save_latent
from tests.comfy.server import Refused

pytestmark = pytest.mark.server


def with_latent(prompt):
    """The prompt saving its latent instead of a picture."""
    prompt = copy.deepcopy(prompt)
    (decode,) = old_graphs.nodes_of(prompt, "VAEDecode")
    (picture,) = old_graphs.nodes_of(prompt, "SaveImage")
    inputs = {"samples": decode["inputs"]["samples"], "filename_prefix": "latents/old"}
    picture |= {"class_type": "SaveLatent", "inputs": inputs}
    return prompt


def picked(name):
    prompt = old_graphs.pick_old_files(old_graphs.api(name), name)
    return old_graphs.use_sprint_sampler(prompt) if name in old_graphs.SPRINT else prompt


def test_the_front_end_is_told_of_every_old_class(server):
    served = server.get("/node_replacements")
    ours = {old: entry for old, (entry,) in served.items() if old in old_graphs.OLD_CLASSES}
    assert ours.keys() == old_graphs.OLD_CLASSES
    places = {old: len(entry["output_mapping"]) for old, entry in ours.items()}
    assert places == dict.fromkeys(old_graphs.OLD_CLASSES, 1) | {"SanaResolutionSelect": 2}


def test_the_server_names_what_has_to_be_chosen(server):
    with pytest.raises(Refused) as refused:
        server.run(old_graphs.api("sprint"))
    for wanted in ("Sana_Sprint_0.6B_1024px", "gemma-2-2b-it", "dc-ae-f32c32-sana-1.1-diffusers", "'scm' not in"):
        assert wanted in str(refused.value)


@pytest.mark.parametrize("name, size", [("sana", (384, 672)), ("sprint", (96, 64))])
def test_an_old_prompt_draws_a_picture(server, name, size):
    (picture,) = server.images(finished(server, picked(name)))
    assert picture.size == size and max(high for _, high in picture.getextrema()) > 0


def test_conditioning_and_batch_are_ours(server, graph, models):
    """SanaResolutionCond adds nothing, and a prompt that a program wrote, without titles, runs too."""
    model, clip, _ = models
    old = with_latent(picked("conditioned"))
    for node in old.values():
        del node["_meta"]
    positive, negative = encode(graph, clip), encode(graph, clip, "")
    sampled = k_sample(graph, model, positive, negative, empty(graph, batch_size=2), steps=2)
    graph.nodes[sampled[0]]["inputs"]["sampler_name"] = "dpmpp_2m"
    save_latent(graph, sampled)
    assert latent_of(server, old).equal(latent_of(server, graph))


def test_the_sprint_model_samples_as_if_scm_model_sampling_were_not_there(server, graph, models):
    loader = graph.add("SanaDiffusionModelLoader", model_name="sprint.safetensors")
    positive = encode(graph, models[1], "two green birds sleep under a warm yellow sun")
    latent = empty(graph, width=64, height=64)
    settings = {"seed": 7, "steps": 2} | old_graphs.SPRINT_SETTINGS
    sampled = graph.add("SanaSprintSampler", model=loader, positive=positive, latent_image=latent, **settings)
    save_latent(graph, sampled)
    assert latent_of(server, with_latent(picked("sprint_first"))).equal(latent_of(server, graph))
