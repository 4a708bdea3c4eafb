"""Sana PAG within ComfyUI's sampling: blocks in front of the perturbed one run once for both predictions."""

from contextlib import contextmanager

import pytest
import torch

from sana_core.checkpoint import save_transformer
from tests import tiny

LAYER, DEPTH = 2, 4
SIGMA = 0.6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "deep.safetensors"
    save_transformer(tiny.transformer(depth=DEPTH), path)
    return path


@pytest.fixture
def plain(part, path):
    return part("nodes.adapter").load_model(path)


@pytest.fixture
def model(part, plain):
    return part("nodes.guidance").perturb_attention(plain, 2.0, [LAYER])


@pytest.fixture
def rows(plain):
    """How many rows each block ran, for each call of the transformer: [call][block]."""
    calls = []
    for index, block in enumerate(plain.model.diffusion_model.blocks):

        def count(module, args, index=index):
            if index == 0:
                calls.append([])
            calls[-1].append(len(args[0]))

        block.register_forward_pre_hook(count)
    return calls


def caption(seed, length=20, tokens=9, **options):
    """A conditioning of one entry."""
    embeds = torch.randn(1, length, tiny.CHANNELS, generator=torch.Generator().manual_seed(seed))
    return [[embeds, {"attention_mask": (torch.arange(length) < tokens).long()[None], **options}]]


def latents(count=1):
    return torch.randn(count, 32, 4, 6, generator=torch.Generator().manual_seed(5))


class Ask:
    """A sampler that asks the guided model at two noise levels, the second time for what the first answer leaves."""

    def sample(self, guider, sigmas, extra_args, callback, noise, *_):
        for sigma in (SIGMA, SIGMA / 2):
            noise = guider(noise, torch.full((len(noise),), sigma), **extra_args)
        return noise


def ask(model, positive=None, negative=None, cfg=4.5, count=1):
    """x0 of the guided model in ComfyUI's own machinery."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or caption(1), negative or caption(2, tokens=4))
    guider.set_cfg(cfg)
    x = latents(count)
    with torch.inference_mode():
        return guider.sample(x, torch.zeros_like(x), Ask(), torch.tensor([SIGMA, 0.0]), disable_pbar=True, seed=0)


@contextmanager
def unshared(part, monkeypatch):
    """The perturbed prediction in a call of its own."""
    with monkeypatch.context() as patched:
        patched.setattr(part("nodes.guidance"), "_can_share", lambda *_: False)
        yield


def shares(part, monkeypatch, rows, run):
    """Rows of the calls of `run`, whose result is that of the calls apart; those of the calls apart."""
    found = run()
    together = rows.copy()
    rows.clear()
    with unshared(part, monkeypatch):
        wanted = run()
    assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
    assert wanted.abs().max() > 0.1
    return together, rows.copy()


def test_one_call_and_the_blocks_in_front_run_once(part, monkeypatch, model, rows):
    together, apart = shares(part, monkeypatch, rows, lambda: ask(model))
    assert together == [[2, 2, 3, 3]] * 2
    assert apart == [[2] * DEPTH, [1] * DEPTH] * 2


def test_the_perturbation_shows(plain, model):
    assert (ask(model) - ask(plain)).abs().max() > 1e-2


def half(*conditioning):
    """The left half of the picture: 4 x 3 latents of 4 x 6."""
    return [[embeds, {**options, "area": (4, 3, 0, 0), "strength": 1.0}] for embeds, options in conditioning]


CONDITIONINGS = {
    "two latents": ({"count": 2}, [[4, 4, 6, 6]]),
    "no guidance": ({"cfg": 1.0}, [[1, 1, 2, 2]]),
    "captions of two lengths": ({"positive": caption(1, length=30)}, [[1, 1, 2, 2], [1] * DEPTH]),
    "two prompts": ({"positive": caption(1) + caption(3)}, [[3, 3, 5, 5]]),
    "an area": ({"positive": half(*caption(1)) + caption(3)}, [[2, 2, 3, 3]] * 2),
    "an area alone": ({"positive": half(*caption(1))}, [[2, 2, 3, 3], [1] * DEPTH]),
    "an area of the negative": ({"negative": half(*caption(2))}, [[1, 1, 2, 2], [2, 2, 3, 3]]),
    "a mask": ({"positive": [[c, {**o, "mask": torch.rand(1, 4, 6)}] for c, o in caption(1)]}, [[2, 2, 3, 3]]),
    "two negatives": ({"negative": caption(2) + caption(4)}, [[3, 3, 4, 4]]),
}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_conditionings_as_core_batches_them(part, monkeypatch, model, rows, name):
    arguments, wanted = CONDITIONINGS[name]
    together, apart = shares(part, monkeypatch, rows, lambda: ask(model, **arguments))
    half_of = len(together) // 2  # two noise levels
    assert sorted(together[:half_of]) == sorted(wanted)
    assert sum(map(sum, together)) < sum(map(sum, apart))


@pytest.mark.parametrize("most, wanted", [(2, [[1] * DEPTH, [2] * DEPTH]), (1, [[1] * DEPTH] * 3)])
def test_what_memory_takes_apart_runs_on_its_own(part, monkeypatch, model, rows, most, wanted):
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 0 if shape[0] <= most else float("inf"))
    together, _ = shares(part, monkeypatch, rows, lambda: ask(model))
    assert together == wanted * 2


@pytest.mark.parametrize("side, wanted", [("both", [[4, 4, 6, 6]]), ("positive", [[2, 2, 4, 4], [2] * DEPTH])])
def test_controlnets(part, monkeypatch, tiny_models, model, rows, side, wanted):
    import nodes

    control = part("nodes.control").load_control(tiny_models / "controlnet" / "tiny.safetensors")
    vae = part("nodes.vae").load_vae(tiny_models / "vae" / "tiny.safetensors")
    pictures = torch.rand(2, 128, 192, 3, generator=torch.Generator().manual_seed(2))
    conditionings = [caption(1), caption(2)]
    controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(*conditionings, control, pictures, 0.7, 0, 1, vae)
    negative = controlled[1] if side == "both" else conditionings[1]
    together, _ = shares(part, monkeypatch, rows, lambda: ask(model, controlled[0], negative, count=2))
    assert together == wanted * 2


def wrap(kind):
    return lambda model: model.add_wrapper(kind, lambda executor, *args, **kwargs: executor(*args, **kwargs))


REASONS = {
    "calc_cond_batch": wrap("calc_cond_batch"),
    "apply_model": wrap("apply_model"),
    "diffusion_model": wrap("diffusion_model"),
    "function": lambda model: model.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"])
    ),
    "attention patch": lambda model: model.set_model_attn1_replace(lambda q, k, v, _: q, "block", 0),
    "block patch": lambda model: model.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 3
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_where_others_look_on_it_is_a_call_of_its_own(part, monkeypatch, model, rows, reason):
    REASONS[reason](model)
    together, apart = shares(part, monkeypatch, rows, lambda: ask(model))
    assert together == apart


def test_weights_that_hooks_change(part, monkeypatch, model, rows):
    import comfy.hooks

    weight = model.model.diffusion_model.blocks[0].attn.qkv.weight
    patches = {"diffusion_model.blocks.0.attn.qkv.weight": (0.1 * torch.ones_like(weight),)}
    hooks = comfy.hooks.create_hook_lora(patches, 1.0, 1.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(caption(1), hooks)
    together, apart = shares(part, monkeypatch, rows, lambda: ask(model, hooked))
    assert together == apart


def test_two_nodes_share_with_the_one_that_asks_first(part, monkeypatch, model, rows):
    both = part("nodes.guidance").perturb_attention(model, 1.5, [1])
    together, apart = shares(part, monkeypatch, rows, lambda: ask(both))
    assert len(together) == 4 and len(apart) == 6


def test_outside_of_its_part_of_the_schedule_nothing_is_asked(part, plain, rows):
    late = part("nodes.guidance").perturb_attention(plain, 2.0, [LAYER], 0.99, 1.0)
    ask(late)
    assert rows == [[2] * DEPTH] * 2


@pytest.mark.parametrize("changed", ["input", "sigma", "cond", None])
def test_a_prediction_for_something_else_is_not_taken(part, monkeypatch, changed):
    import comfy.samplers

    guidance = part("nodes.guidance")
    node = guidance.PerturbedGuidance(2.0, (1,), 0.0, 1.0)
    monkeypatch.setattr(guidance, "_can_share", lambda *_: True)
    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", lambda *_: (torch.full((1,), 7.0),))
    options = {"transformer_options": {}}
    args = {"input": torch.zeros(1), "sigma": torch.ones(1), "cond": [{}], "model": None, "model_options": options}
    answer = node.predict(
        lambda model, conds, *_: [torch.full((1,), float(i)) for i in range(len(conds))],
        None, [args["cond"], None], args["input"], args["sigma"], options,
    )  # fmt: skip
    assert [one.item() for one in answer] == [0, 1]
    if changed:
        args[changed] = args[changed].copy() if changed == "cond" else args[changed].clone()
    args.update(denoised=torch.zeros(1), cond_denoised=torch.zeros(1))
    assert node.add(args).item() == 2 * (-7.0 if changed else -2.0)
    assert node.add(args).item() == -14.0, "each prediction is taken once"


def test_batches_of_any_order(part):
    module = part("nodes.perturbation")
    split, Part = module.split, module.Part
    assert split([2, 1, 0], "aba", 2) == [Part((1, 2, 0), 1)]
    assert split([0, 2, 1, 2, 0], "baxba"[:5], 2) == [Part((2, 4, 0, 1, 3), 2)]
    assert split([2, 0], "ab", 2) == [Part((1,)), Part((0,), perturbed=True)]
    assert split([2], "a", 2) == [Part((0,), perturbed=True)]
    assert split([1, 0], "ab", 2) == [Part((0, 1))]
