"""Under ComfyUI steps are repeated from graphs with the same bits, and only where nothing else has a say in them.

A recorder in plain Python stands in for CUDA.
"""

import copy

import pytest
import torch

from tests.recorder import PlainRecorder

STEPS = 4
pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "diffusion_models" / "tiny.safetensors"


@pytest.fixture
def recorder():
    return PlainRecorder()


@pytest.fixture
def patcher(part, path, recorder, monkeypatch):
    patcher = part("nodes.adapter").load_model(path)
    monkeypatch.setattr(patcher.model.graphs, "_recorder_of", recorder)
    return patcher


@pytest.fixture
def plain(part, path, sample):
    """The same run without graphs; `change` makes of the MODEL what the run with graphs has."""
    return lambda *args, change=lambda patcher: patcher, **kwargs: sample(
        change(part("nodes.adapter").load_model(path, cuda_graph=False)), *args, **kwargs
    )


def lora(patcher, strength=0.1):
    clone = patcher.clone()
    weight = patcher.model.diffusion_model.blocks[0].attn.qkv.weight
    clone.add_patches({"diffusion_model.blocks.0.attn.qkv.weight": (torch.ones_like(weight),)}, strength)
    return clone


def test_steps_are_replayed_and_the_picture_is_the_same(patcher, recorder, sample, plain):
    once = sample(patcher)
    assert recorder.counts == {"devices": 1, "warm-ups": 1, "recordings": 1, "replays": STEPS - 1}
    again = sample(patcher, 3)
    assert torch.equal(once, plain()) and torch.equal(again, plain(3)), "a prompt, and another"
    assert recorder.counts["recordings"] == 1 and recorder.counts["replays"] == 2 * STEPS - 1


def test_a_lora_never_meets_a_graph_of_other_weights(patcher, recorder, sample, plain):
    before = sample(patcher)
    after = sample(lora(patcher))
    assert torch.equal(after, plain(change=lora)) and not torch.equal(after, before)
    assert torch.equal(sample(patcher), before)
    assert recorder.counts["recordings"] == 3


def wrapped(patcher):
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    patcher.add_wrapper(kind, lambda executor, *args, **kwargs: 0.9 * executor(*args, **kwargs))


def wrapped_outside(patcher):
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper(kind, lambda executor, *args, **kwargs: 0.9 * executor(*args, **kwargs))


def called_by_a_function(patcher):
    patcher.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))


def hooked(patcher):
    import comfy.hooks

    patcher.forced_hooks = comfy.hooks.HookGroup()


def short_of_memory(patcher):
    patcher.add_callback("on_pre_run", lambda patcher: setattr(patcher.model, "model_lowvram", True))
    patcher.add_callback("on_cleanup", lambda patcher: setattr(patcher.model, "model_lowvram", False))


def patched(patcher):
    patcher.set_model_patch_replace(lambda q, k, v, options: v, "attn1", "block", 0)


def overridden(patcher):
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kwargs: 0.9 * function(*args, **kwargs)


def with_another_layer(patcher):
    block = copy.deepcopy(patcher.model.diffusion_model.blocks[1].mlp)
    patcher.add_object_patch("diffusion_model.blocks.0.mlp", block)


def cast_at_use(patcher):
    patcher.model.diffusion_model.x_embedder.proj.comfy_cast_weights = True


def moved_by_core(patcher):
    patcher.is_dynamic = lambda: True
    patcher.model.current_patcher = patcher


CHANGES = [
    wrapped, wrapped_outside, called_by_a_function, hooked, short_of_memory, patched, overridden, with_another_layer,
    cast_at_use,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_no_graph_where_others_have_a_say(patcher, recorder, sample, plain, change):
    change(patcher)
    assert torch.equal(sample(patcher), plain(change=lambda other: (change(other), other)[1]))
    assert recorder.counts["warm-ups"] == recorder.counts["recordings"] == 0


def test_no_graph_with_dynamic_memory(patcher):
    moved_by_core(patcher)
    assert not patcher.model._keeps_weights({})
    patcher.is_dynamic = lambda: False
    assert patcher.model._keeps_weights({})


def test_graphs_go_when_core_takes_the_model_away(patcher, sample, recorder):
    sample(patcher)
    assert len(patcher.model.graphs._recordings) == 1
    patcher.clone().detach()
    assert len(patcher.model.graphs._recordings) == 0
    sample(patcher)
    assert recorder.counts["recordings"] == 2


def test_a_copied_network_has_graphs_of_its_own(patcher, sample):
    sample(patcher)
    network, graphs = copy.deepcopy([patcher.model.diffusion_model, patcher.model.graphs])
    assert graphs._network is graphs._call._network is graphs._call._call.__self__ is network and not graphs._recordings


def test_perturbed_attention_runs_beside_the_graphs(part, patcher, recorder, sample, plain):
    perturb = part("nodes.guidance").perturb_attention
    perturbed = sample(perturb(patcher, 2.0))
    assert torch.equal(perturbed, plain(change=lambda other: perturb(other, 2.0)))
    assert recorder.counts["replays"] == STEPS - 1, "the guided half of each step"


@pytest.mark.parametrize("choice, graphs, dynamic", [("auto", True, True), ("on", True, False), ("off", False, True)])
def test_the_loaders_choice(part, path, monkeypatch, choice, graphs, dynamic):
    import comfy.model_patcher

    class Dynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    loaders = part("nodes.loaders")
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    monkeypatch.setattr(loaders, "find_model", lambda kind, name: path)
    (model,) = loaders.SanaDiffusionModelLoader.execute("tiny", cuda_graph=choice).result
    assert (model.model.graphs is not None, model.is_dynamic()) == (graphs, dynamic)
    load, arguments = model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert (again.model.graphs is not None, again.is_dynamic()) == (graphs, False)


def test_an_old_workflow_has_no_such_input(part, path, monkeypatch):
    loaders = part("nodes.loaders")
    (entry,) = (one for one in loaders.SanaDiffusionModelLoader.define_schema().inputs if one.id == "cuda_graph")
    assert entry.optional and entry.default == "auto"
    monkeypatch.setattr(loaders, "find_model", lambda kind, name: path)
    (model,) = loaders.SanaDiffusionModelLoader.execute("tiny", "auto", "auto").result
    assert model.model.graphs is not None
