"""Steps that are repeated from graphs give the same bits, and no graph outlives what it was recorded with.

A recorder in plain Python stands in for CUDA, whose graphs tests/kernels/test_cuda_graph.py compares.
"""

import copy
import gc
import logging

import pytest
import torch

from sana_core import SanaPipeline
from sana_core.models.controlnet import Control
from sana_core.models.graph import LIMIT, GraphedCalls, cuda_recorder
from sana_core.models.layers import CrossAttention
from sana_core.models.lora import LoraLayer, apply_lora
from sana_core.models.sana import Perturbation
from tests import tiny
from tests.recorder import PlainRecorder

PROMPTS = ["a red cat", "two green birds sleep under a warm yellow sun"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Where no projection is absorbed."""
    monkeypatch.setattr(CrossAttention, "_absorbs", lambda *_: False)


@pytest.fixture
def network():
    return tiny.transformer()


@pytest.fixture
def recorder():
    return PlainRecorder()


@pytest.fixture
def graphs(network, recorder):
    return GraphedCalls(network, recorder=recorder)


def inputs_of(network, seed=0, batch=2, height=3, tokens=(5, 9)):
    """Latents, timesteps and prepared captions, whose mask matters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 32, height, 5, generator=generator)
    timestep = 1000 * torch.rand(1, generator=generator).expand(batch)
    mask = torch.arange(12) < torch.tensor(tokens)[:batch, None]
    context = network.prepare_context(torch.randn(batch, 12, tiny.CHANNELS, generator=generator), mask)
    return x, timestep, context


def assert_equal(graphs, network, inputs, **options):
    assert torch.equal(graphs(*inputs, **options), network(*inputs, **options))


def test_the_second_call_is_recorded_and_all_are_bit_equal(graphs, network, recorder):
    context = inputs_of(network)[2]
    results = []
    for seed in range(4):
        inputs = (*inputs_of(network, seed)[:2], context)
        results.append((graphs(*inputs), network(*inputs)))
    assert all(torch.equal(*pair) for pair in results), "each in memory of its own"
    assert recorder.counts == {"devices": 1, "warm-ups": 1, "recordings": 1, "replays": 3}


def test_captions_are_copied_when_they_change_and_not_kept(graphs, network, monkeypatch):
    inputs = inputs_of(network)
    copied, copy_ = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda own, given: (copied.append(own), copy_(own, given))[1])
    counts = []
    for one in (inputs, inputs, inputs, inputs_of(network, 1)):
        copied.clear()
        assert_equal(graphs, network, one)
        counts.append(len(copied))
    step, replay, prompt = 2, 1, 2 + 2 * tiny.TRANSFORMER.depth
    assert counts == [0, step + prompt + replay, step + replay, step + prompt + replay]
    del inputs, one
    gc.collect()
    assert_equal(graphs, network, inputs_of(network, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 1}, {"height": 4}, {"tokens": (5, 7)}, {"tokens": (9, 9)},
    ],
)  # fmt: skip
def test_other_shapes_have_graphs_of_their_own(graphs, network, recorder, change):
    for _ in range(3):
        assert_equal(graphs, network, inputs_of(network))
        assert_equal(graphs, network, inputs_of(network, **change))
    assert recorder.counts["recordings"] == 2


def test_perturbed_rows_are_told_apart(graphs, network, recorder):
    perturbations = [None, Perturbation((0,), 1), Perturbation((1,), 1), Perturbation((1,), 2)]
    for _ in range(3):
        for perturbation in perturbations:
            assert_equal(graphs, network, inputs_of(network), perturbation=perturbation)
    assert recorder.counts["recordings"] == len(perturbations) == LIMIT


def test_sprints_guidance_is_an_input(recorder):
    network = tiny.sprint()
    graphs = GraphedCalls(network, recorder=recorder)
    for scale in (1.0, 4.5, 2.0):
        assert_equal(graphs, network, inputs_of(network), guidance=torch.full((2,), scale))
    assert recorder.counts["replays"] == 2


def test_the_longest_unused_graph_goes(graphs, network, recorder):
    sizes = range(1, LIMIT + 2)
    for height in sizes:
        for _ in range(2):
            graphs(*inputs_of(network, height=height))
    assert recorder.counts["recordings"] == len(sizes)
    for height in reversed(sizes):  # the first alone has to begin again
        assert_equal(graphs, network, inputs_of(network, height=height))
    assert recorder.counts == {"devices": 1, "warm-ups": len(sizes) + 1, "recordings": len(sizes), "replays": 9}


def moved(network):
    network.blocks[1].attn.proj.weight.data = network.blocks[1].attn.proj.weight.data.clone()


def reloaded(network):
    network.load_state_dict({key: 0.9 * value for key, value in network.state_dict().items()}, assign=True)


def another_layer(network):
    network.blocks[0].mlp = copy.deepcopy(network.blocks[1].mlp)


def another_forward(network):
    forward = network.blocks[0].forward
    network.blocks[0].forward = lambda x, *rest: 0.9 * forward(x, *rest)


@pytest.mark.parametrize("change", [moved, reloaded, another_layer, another_forward])
def test_graphs_go_when_weights_move_or_layers_change(graphs, network, recorder, change):
    for _ in range(2):
        graphs(*inputs_of(network))
    change(network)
    for _ in range(3):
        assert_equal(graphs, network, inputs_of(network))
    assert recorder.counts == {"devices": 2, "warm-ups": 2, "recordings": 2, "replays": 3}


def test_values_may_change_in_place(graphs, network, recorder):
    """As the pipeline's LoRAs and training change them."""
    inputs = inputs_of(network)
    before = [graphs(*inputs) for _ in range(2)][1]
    layer = LoraLayer("blocks.0.attn.qkv.weight", None, torch.ones(1, 64), torch.ones(192, 1))
    apply_lora(network, [layer], 0.1)
    assert_equal(graphs, network, inputs)
    assert not torch.equal(graphs(*inputs), before) and recorder.counts["recordings"] == 1


def with_gradients(graphs, network, inputs):
    with torch.enable_grad():
        assert graphs(*inputs).requires_grad


def with_autocast(graphs, network, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(graphs, network, inputs)


def with_hook(graphs, network, inputs):
    with network.blocks[0].register_forward_hook(lambda module, given, out: 2 * out):
        assert_equal(graphs, network, inputs)


def with_weight_elsewhere(graphs, network, inputs):
    weight = network.final_layer.scale_shift_table
    network.final_layer.scale_shift_table = torch.nn.Parameter(weight.to("meta"))
    with pytest.raises(RuntimeError, match="meta"):  # the transformer's own: nothing offloads it here
        graphs(*inputs)
    network.final_layer.scale_shift_table = weight


def with_control(graphs, network, inputs):
    control = Control(tiny.controlnet(), inputs[0])
    assert_equal(graphs, network, inputs, control=[control])
    assert not torch.equal(graphs(*inputs, control=[control]), network(*inputs))


def with_plain_caption(graphs, network, inputs):
    context = torch.randn(2, 12, tiny.CHANNELS, generator=torch.Generator().manual_seed(1))
    assert_equal(graphs, network, (*inputs[:2], context, torch.ones(2, 12)))


def with_large_latents(graphs, network, inputs):
    x = torch.randn(1, 32, 129, 128)
    assert_equal(graphs, network, (x, *inputs_of(network, batch=1)[1:]))


@pytest.mark.parametrize(
    "run",
    [with_gradients, with_autocast, with_hook, with_weight_elsewhere, with_control, with_plain_caption,
     with_large_latents],
)  # fmt: skip
def test_no_graph_where_it_could_be_wrong(graphs, network, recorder, run):
    inputs = inputs_of(network)
    for _ in range(2):
        graphs(*inputs)
    before = recorder.counts.copy()
    for _ in range(3):
        run(graphs, network, inputs)
    assert recorder.counts == before
    assert_equal(graphs, network, inputs)


def test_a_cpu_has_no_graphs():
    assert cuda_recorder(torch.device("cpu")) is None


def test_inference_mode_has_graphs_of_its_own(graphs, network):
    with torch.inference_mode():
        inputs = inputs_of(network)
        for _ in range(3):
            assert_equal(graphs, network, inputs)
    for _ in range(3):
        assert_equal(graphs, network, inputs_of(network))


def test_a_failed_recording_is_said_once_and_the_result_is_right(network, caplog):
    recorder = PlainRecorder(torch.OutOfMemoryError("CUDA out of memory"))
    graphs = GraphedCalls(network, recorder=recorder)
    with caplog.at_level(logging.WARNING):
        for height in (3, 3, 3, 4, 4):
            assert_equal(graphs, network, inputs_of(network, height=height))
    assert recorder.counts["recordings"] == 1
    assert caplog.text.count("CUDA graph of the transformer failed") == 1 and "out of memory" in caplog.text


def test_the_models_own_errors_stay_its_own(graphs, network):
    with pytest.raises(ValueError, match="takes no embedded guidance"):
        graphs(*inputs_of(network), guidance=torch.ones(2))
    with pytest.raises(ValueError, match="3 rows of a batch of 2 cannot be perturbed"):
        graphs(*inputs_of(network), perturbation=Perturbation((0,), 3))
    for _ in range(3):
        assert_equal(graphs, network, inputs_of(network))


def test_a_copy_has_graphs_of_its_own_network(graphs, network):
    for _ in range(2):
        graphs(*inputs_of(network))
    copied = copy.deepcopy({"network": network, "graphs": graphs})
    reloaded(copied["network"])
    for _ in range(3):
        assert_equal(copied["graphs"], copied["network"], inputs_of(network))
        assert_equal(graphs, network, inputs_of(network))


@pytest.fixture(scope="module")
def parts():
    return tiny.transformer(), tiny.dc_ae(), tiny.text_encoder()


@pytest.mark.parametrize(
    "settings, kinds",
    [
        ({}, 3),
        ({"pag_guidance_scale": 2.0}, 3),
        ({"guidance_interval": (0.3, 0.9)}, 5),  # two prompts without guidance are shaped like one with
        ({"guidance_scale": 1.0, "sampler": "flow_euler"}, 3),
    ],
)
def test_whole_samplings_are_bit_equal(parts, monkeypatch, settings, kinds):
    recorder = PlainRecorder()
    eager, graphed = (SanaPipeline(*parts, cuda_graph=choice) for choice in (False, True))
    monkeypatch.setattr(graphed._call, "_recorder_of", recorder)
    settings = {"seed": 3, "num_inference_steps": 8, "output_type": "latent", **settings}
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS):
        assert torch.equal(graphed(prompt, "blue", **settings), eager(prompt, "blue", **settings))
    assert recorder.counts["replays"] == 3 * 8 - recorder.counts["warm-ups"]
    assert recorder.counts["recordings"] == kinds


def test_sprint_and_a_lora_between_two_pictures(parts, monkeypatch):
    recorder, parts = PlainRecorder(), (tiny.sprint(), *parts[1:])
    eager, graphed = (SanaPipeline(*parts, cuda_graph=choice) for choice in (False, True))
    monkeypatch.setattr(graphed._call, "_recorder_of", recorder)
    settings = {"seed": 3, "num_inference_steps": 2, "output_type": "latent"}
    before = graphed(PROMPTS[0], **settings)
    layer = LoraLayer("blocks.1.cross_attn.kv_linear.weight", None, torch.ones(1, 64), torch.ones(128, 1))
    apply_lora(parts[0], [layer], 0.1)
    after = graphed(PROMPTS[0], **settings)
    assert torch.equal(after, eager(PROMPTS[0], **settings)) and not torch.equal(after, before)
    assert recorder.counts["recordings"] == 1 and recorder.counts["replays"] == 3


def test_absorbed_captions_are_not_recorded(graphs, network, recorder, monkeypatch):
    monkeypatch.undo()
    x, timestep, _ = inputs_of(network)
    context = torch.randn(2, 12, tiny.CHANNELS, generator=torch.Generator().manual_seed(0))
    context = network.prepare_context(context, torch.arange(12) < torch.tensor([5, 9])[:, None], absorb=True)
    for _ in range(3):
        assert_equal(graphs, network, (x, timestep, context))
    assert recorder.counts["recordings"] == 0


def test_where_there_are_no_graphs_weights_are_not_looked_at_again(network, monkeypatch):
    graphs = GraphedCalls(network)
    inputs = inputs_of(network)
    assert_equal(graphs, network, inputs)
    monkeypatch.setattr("sana_core.models.graph._addresses", lambda *_: pytest.fail("a walk over all modules"))
    assert_equal(graphs, network, inputs)
