"""Captions are prepared once for a sampling run, and nothing prepared outlives what it was made of."""

import copy
import gc
import uuid
from unittest.mock import patch

import pytest
import torch

from tests.tiny import conditioning

STEPS = 3


@pytest.fixture
def patcher(part, tiny_models):
    return part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")


@pytest.fixture
def prepared(patcher):
    """Counts how often captions are prepared."""
    network = patcher.model.diffusion_model
    with patch.object(network, "prepare_context", wraps=network.prepare_context) as counted:
        yield counted


def plain(part, run, *args, **kwargs):
    """The same run with captions prepared at each step."""
    with patch.object(part("nodes.adapter").SanaModel, "_keeps_context", lambda *_: False):
        return run(*args, **kwargs)


def agree(found, expected):
    """But for rounding, where captions that are prepared once have absorbed projections."""
    return (found - expected).abs().max() < 1e-5 * expected.abs().max()


def lora(patcher, layer):
    clone = patcher.clone()
    weight = patcher.model.diffusion_model.get_parameter(f"blocks.0.cross_attn.{layer}.weight")
    clone.add_patches({f"diffusion_model.blocks.0.cross_attn.{layer}.weight": (torch.ones_like(weight),)}, 0.1)
    return clone


def test_captions_are_prepared_once_and_the_picture_is_the_same(part, patcher, prepared, sample, as_on_a_gpu):
    once = sample(patcher)
    assert prepared.call_count == 1
    assert torch.equal(once, plain(part, sample, patcher))
    assert prepared.call_count == 1 + STEPS


@pytest.mark.parametrize("change", ["prompt", "kv_linear"])
def test_a_change_between_runs_counts(part, patcher, sample, change, as_on_a_gpu):
    before = sample(patcher)
    changed = patcher if change == "prompt" else lora(patcher, change)
    prompt = 3 if change == "prompt" else 1
    after = sample(changed, prompt)
    assert not torch.equal(after, before)
    assert torch.equal(after, plain(part, sample, changed, prompt))
    assert torch.equal(sample(patcher), before)


@pytest.mark.parametrize("layer", ["kv_linear", "q_linear", "proj"])
def test_absorbed_projections_have_the_weights_of_the_run(part, patcher, sample, layer):
    before, changed = sample(patcher), lora(patcher, layer)
    after = sample(changed)
    assert agree(before, plain(part, sample, patcher)) and not agree(after, before)
    assert agree(after, plain(part, sample, changed))
    assert torch.equal(sample(patcher), before)


@pytest.mark.parametrize("reason", ["cast", "patches_replace", "optimized_attention_override"])
def test_projections_are_absorbed_only_where_nothing_else_has_a_say_in_them(part, patcher, sample, reason):
    layers = part("sana_core.models.layers")
    with patch.object(layers.CrossAttention, "_absorbed", autospec=True, side_effect=AssertionError("absorbed")):
        with pytest.raises(AssertionError, match="absorbed"):
            sample(patcher)
        clone = patcher.clone()
        if reason == "cast":
            clone.model.diffusion_model.x_embedder.proj.comfy_cast_weights = True
        elif reason == "patches_replace":
            clone.set_model_attn1_replace(lambda q, k, v, options: v, "block", 0)
        else:
            clone.model_options["transformer_options"][reason] = lambda attention, *args, **kwargs: attention(
                *args, **kwargs
            )
        assert sample(clone).isfinite().all()


def test_nothing_is_held_after_the_run(patcher, sample):
    sample(patcher)
    gc.collect()
    assert len(patcher.model.prepared_contexts._batches) == 0


@pytest.mark.parametrize("reason", ["wrapper", "function", "hooks", "low memory"])
def test_without_certainty_each_step_prepares(patcher, prepared, sample, reason):
    import comfy.patcher_extension

    if reason == "wrapper":
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        patcher.add_wrapper(kind, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    elif reason == "function":
        patcher.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    elif reason == "hooks":
        import comfy.hooks

        patcher.forced_hooks = comfy.hooks.HookGroup()
    else:
        patcher.add_callback("on_pre_run", lambda patcher: setattr(patcher.model, "model_lowvram", True))
    sample(patcher)
    patcher.model.model_lowvram = False
    assert prepared.call_count == STEPS


def test_a_wrapper_around_the_model_may_change_the_features(patcher, prepared, sample):
    import comfy.patcher_extension

    def without_caption(executor, x, t, c_concat, c_crossattn, *args, **kwargs):
        return executor(x, t, c_concat, torch.zeros_like(c_crossattn), *args, **kwargs)

    before = sample(patcher)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    changed = patcher.clone()
    changed.add_wrapper(kind, without_caption)
    assert not torch.equal(sample(changed), before)
    assert prepared.call_count == 1 + STEPS


def test_an_area_does_not_lend_its_caption_to_the_opposite_side(part, patcher, comfy, monkeypatch, as_on_a_gpu):
    """Core copies the positive conditioning, id and all, to give the negative caption the same area."""
    import comfy.sample

    (embeds, options), *_ = conditioning(1)
    positive = [[embeds, {**options, "area": (3, 2, 0, 0), "strength": 1.0}]]
    noise = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(0))

    def run():
        return comfy.sample.sample(
            patcher, noise, STEPS, 4.5, "euler", "normal", positive, conditioning(2),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip

    # One conditioning at a time, as where memory is short.
    monkeypatch.setattr(patcher.model, "memory_required", lambda shape, **_: 0 if shape[0] == 1 else float("inf"))
    assert torch.equal(run(), plain(part, run))


@pytest.fixture
def control(part, tiny_models):
    return part("nodes.control").load_control(tiny_models / "controlnet" / "tiny.safetensors")


@pytest.fixture
def controlled(part, tiny_models, comfy):
    """A run with a control over a part of the schedule, and one of the same weights over all of it."""
    import comfy.sample

    import nodes

    vae = part("nodes.vae").load_vae(tiny_models / "vae" / "tiny.safetensors")
    picture = torch.rand(1, 96, 160, 3, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(0))

    def run(patcher, control, positive=1, end=1.0, chained=False):
        sides = conditioning(positive), conditioning(2)
        for one in [picture, picture.flip(1)][: 1 + chained]:
            sides = nodes.ControlNetApplyAdvanced().apply_controlnet(*sides, control, one, 0.8, 0.0, end, vae)
        return comfy.sample.sample(
            patcher, noise, STEPS, 4.5, "euler", "normal", *sides, torch.zeros_like(noise), disable_pbar=True, seed=0
        )

    return run


@pytest.fixture
def branched(control):
    """Counts how often captions are prepared for the ControlNet."""
    net = control.patcher.model
    with patch.object(net, "prepare_context", wraps=net.prepare_context) as counted:
        yield counted


def unprepared(part, run, *args, **kwargs):
    """The same run with captions prepared for the ControlNet at each step."""
    with patch.object(part("nodes.adapter"), "kept_nets", lambda _: ()):
        return run(*args, **kwargs)


@pytest.mark.parametrize("chained", [False, True])
def test_a_controlnet_prepares_captions_once(part, patcher, control, controlled, branched, chained):
    once = controlled(patcher, control, chained=chained)
    assert branched.call_count == 1
    assert torch.equal(once, unprepared(part, controlled, patcher, control, chained=chained))
    assert branched.call_count == 1 + STEPS * (1 + chained)
    gc.collect()
    assert len(patcher.model.prepared_contexts._batches) == 0


def test_a_controlnet_that_ends_early(part, patcher, control, controlled):
    early = controlled(patcher, control, end=0.4)
    assert torch.equal(early, unprepared(part, controlled, patcher, control, end=0.4))
    assert not torch.equal(early, controlled(patcher, control))


@pytest.mark.parametrize("change", ["prompt", "weights"])
def test_a_change_between_controlled_runs_counts(part, patcher, control, controlled, change):
    before = controlled(patcher, control)
    changed, positive = control, 3 if change == "prompt" else 1
    if change == "weights":
        changed = control.copy()
        changed.patcher = control.patcher.clone()
        name = "controlnet.0.copied_block.cross_attn.kv_linear.weight"
        weight = control.patcher.model.state_dict()[name]
        changed.patcher.add_patches({name: (torch.ones_like(weight),)}, 0.1)
    after = controlled(patcher, changed, positive)
    assert not torch.equal(after, before)
    assert torch.equal(after, unprepared(part, controlled, patcher, changed, positive))
    assert torch.equal(controlled(patcher, control), before)


def test_a_controlnet_short_of_memory_is_prepared_at_each_step(part, control):
    make, kept_nets = part("sana_core.models.controlnet").Control, part("nodes.contexts").kept_nets
    net, hint = control.patcher.model, torch.zeros(1)
    assert kept_nets([make(net, hint), make(net, hint), make(net, hint, 0.0)]) == (net,)
    assert kept_nets([make(net, hint, 0.0)]) == ()
    net.model_lowvram = True
    assert kept_nets([make(net, hint)]) == ()


def test_contexts_are_told_apart_and_limited(part):
    contexts = part("nodes.contexts").PreparedContexts()
    ids = [uuid.uuid4(), uuid.uuid4()]
    assert contexts.get(ids, "bf16", lambda: 1) == 1
    assert contexts.get(ids, "bf16", lambda: 2) == 1
    assert contexts.get(ids, "fp32", lambda: 2) == 2
    assert contexts.get(ids[::-1], "bf16", lambda: 3) == 3
    assert contexts.get(ids[:1], "bf16", lambda: 4) == 4
    for key in range(contexts.LIMIT):
        contexts.get(ids, key, lambda: 5)
    assert contexts.get(ids, "bf16", lambda: 6) == 6, "the oldest had to go"
    assert copy.deepcopy(contexts).get(ids, "bf16", lambda: 7) == 7
