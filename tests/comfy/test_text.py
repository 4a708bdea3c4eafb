"""Prompts on a real server: encoded once, with their length on the node."""

import pytest

from tests import tiny
from tests.comfy.graphs import PROMPT, empty, finished, k_sample, save_latent

pytestmark = pytest.mark.server


def two_prompts(graph, models, node, **widgets):
    """A picture's latent from a positive and a negative prompt; returns the two encoders' ids and the sampler's."""
    texts = (PROMPT, "blurry")
    positive, negative = (graph.add(node, clip=models[1], text=text, **widgets) for text in texts)
    latent = k_sample(graph, models[0], positive, negative, empty(graph), steps=1)
    save_latent(graph, latent)
    return positive[0], negative[0], latent[0]


@pytest.mark.parametrize("node", ["SanaPromptEncode", "CLIPTextEncode"])
def test_only_a_prompt_that_changed_is_encoded(server, graph, models, node):
    positive, negative, sampler = two_prompts(graph, models, node)
    assert {positive, negative, sampler} <= set(finished(server, graph).ran)
    graph.nodes[sampler]["inputs"]["seed"] += 1
    ran = set(finished(server, graph).ran)
    assert sampler in ran and not {positive, negative} & ran
    graph.nodes[negative]["inputs"]["text"] = "low contrast"
    ran = set(finished(server, graph).ran)
    assert {negative, sampler} <= ran and positive not in ran


def test_a_style_encodes_only_where_it_is_chosen(server, graph, models):
    positive, negative, _ = two_prompts(graph, models, "SanaPromptEncode", style="(No style)")
    finished(server, graph)
    graph.nodes[negative]["inputs"]["style"] = "Anime (negative)"
    ran = set(finished(server, graph).ran)
    assert negative in ran and positive not in ran


def test_the_node_says_how_long_its_text_is(server, graph, models):
    positive, negative, _ = two_prompts(graph, models, "SanaPromptEncode", use_instruction=False)
    graph.nodes[negative]["inputs"]["text"] = "word " * 400
    texts = finished(server, graph).texts
    tokens = len(tiny.tokenizer().encode(PROMPT)) - 1
    assert texts[positive] == f"{tokens} of 299 tokens"
    assert "the text encoder takes 299" in texts[negative] and 'from "' in texts[negative]
