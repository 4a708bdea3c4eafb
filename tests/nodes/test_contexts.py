"""Captions are prepared once for a sampling run, and nothing prepared outlives what it was made of."""

import copy
import gc
import uuid
from unittest.mock import patch

import pytest
import torch

from tests import tiny

STEPS = 3


@pytest.fixture
def patcher(part, tiny_models):
    return part("nodes.adapter").load_model(tiny_models / "diffusion_models" / "tiny.safetensors")


def conditioning(seed, tokens=9):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 20, tiny.CHANNELS, generator=generator)
    mask = (torch.arange(20) < tokens).long()[None]
    return [[embeds, {"attention_mask": mask}]]


@pytest.fixture
def sample(comfy):
    import comfy.sample

    def run(patcher, positive=1, negative=2):
        noise = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(0))
        return comfy.sample.sample(
            patcher, noise, STEPS, 4.5, "euler", "normal", conditioning(positive), conditioning(negative, 4),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip

    return run


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


def lora(patcher, strength):
    clone = patcher.clone()
    weight = patcher.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight
    clone.add_patches({"diffusion_model.blocks.0.cross_attn.kv_linear.weight": (torch.ones_like(weight),)}, strength)
    return clone


def test_captions_are_prepared_once_and_the_picture_is_the_same(part, patcher, prepared, sample):
    once = sample(patcher)
    assert prepared.call_count == 1
    assert torch.equal(once, plain(part, sample, patcher))
    assert prepared.call_count == 1 + STEPS


@pytest.mark.parametrize("change", ["prompt", "lora"])
def test_a_change_between_runs_counts(part, patcher, sample, change):
    before = sample(patcher)
    changed = lora(patcher, 0.1) if change == "lora" else patcher
    prompt = 3 if change == "prompt" else 1
    after = sample(changed, prompt)
    assert not torch.equal(after, before)
    assert torch.equal(after, plain(part, sample, changed, prompt))
    assert torch.equal(sample(patcher), before)


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
