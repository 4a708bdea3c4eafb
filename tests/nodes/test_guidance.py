"""Sana PAG adds its formula to whatever guidance there is; the interval limits cfg."""

import pytest
import torch

from sana_core.checkpoint import load_transformer
from sana_core.models.sana import Perturbation
from tests import tiny

SIGMA = 0.6


@pytest.fixture(scope="module")
def path(tiny_models):
    return tiny_models / "diffusion_models" / "tiny.safetensors"


@pytest.fixture
def guidance(part):
    return part("nodes.guidance")


@pytest.fixture
def model(part, path):
    return part("nodes.adapter").load_model(path)


@pytest.fixture
def sampled():
    """Latents and two captions of different lengths, each with its mask, for a batch of two."""
    generator = torch.Generator().manual_seed(3)
    captions = []
    for length in (7, 40):
        mask = (torch.arange(300) < length).long()[None]
        captions.append((torch.randn(1, 300, tiny.CHANNELS, generator=generator), mask))
    return torch.randn(2, 32, 3, 5, generator=generator), captions


class AskOnce:
    """A sampler that asks the guided model once, at one noise level, and returns its x0."""

    def __init__(self, sigma, model):
        self.sigma = sigma
        self.scale = model.model.latent_format.scale_factor

    def sample(self, guider, sigmas, extra_args, callback, noise, *_):
        x0 = guider(noise, torch.full((len(noise),), self.sigma), **extra_args)
        return self.scale * x0  # so that leaving the latent format gives x0


def ask(model, sampled, cfg, sigma=SIGMA, guider=None):
    """x0 of the guided model in ComfyUI's own machinery."""
    import comfy.samplers

    x, captions = sampled
    positive, negative = ([[embeds, {"attention_mask": mask}]] for embeds, mask in captions)
    guider = guider or comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = AskOnce(sigma, model)
    with torch.no_grad():
        return guider.sample(x, torch.zeros_like(x), sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)


def expected(path, sampled, cfg, *terms, sigma=SIGMA):
    """x0 by the formula, of the plain transformer; terms are (scale, layers)."""
    transformer = load_transformer(path)
    x, captions = sampled
    timestep = torch.full((2,), 1000 * sigma)
    with torch.no_grad():
        cond, uncond = (
            transformer(x, timestep, embeds.expand(2, -1, -1), mask.expand(2, -1)) for embeds, mask in captions
        )
        velocity = uncond + cfg * (cond - uncond)
        embeds, mask = captions[0]
        for scale, layers in terms:
            rows = transformer(
                x, timestep, embeds.expand(2, -1, -1), mask.expand(2, -1), perturbation=Perturbation(layers, 2)
            )
            velocity = velocity + scale * (cond - rows[2:])
    return x - sigma * velocity


def assert_close(actual, wanted):
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


def patched(guidance, model, scale=2.0, **inputs):
    return guidance.SanaPAG.execute(model, scale, **inputs).result[0]


@pytest.mark.parametrize("cfg", [4.5, 1.0])
@pytest.mark.parametrize("layers, indices", [("", (1,)), ("0", (0,)), ("0, 1", (0, 1))])
def test_the_formula(guidance, model, path, sampled, cfg, layers, indices):
    result = ask(patched(guidance, model, layers=layers), sampled, cfg)
    assert_close(result, expected(path, sampled, cfg, (2.0, indices)))
    assert (result - expected(path, sampled, cfg)).abs().max() > 1e-2


def test_scale_0_changes_nothing(guidance, model, sampled):
    assert torch.equal(ask(patched(guidance, model, scale=0.0), sampled, 4.5), ask(model, sampled, 4.5))


def test_a_scale_up_to_1_counts(guidance, model, path, sampled):
    assert_close(ask(patched(guidance, model, 0.5), sampled, 4.5), expected(path, sampled, 4.5, (0.5, (1,))))


def test_chained_nodes_add_up(guidance, model, path, sampled):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    first = patched(guidance, model, 2.0, layers="0")
    both = patched(guidance, first, 3.0, layers="1")
    assert_close(ask(both, sampled, 4.5), expected(path, sampled, 4.5, (2.0, (0,)), (3.0, (1,))))
    core = PerturbedAttentionGuidance.execute(first, 1.5).result[0]
    assert_close(ask(core, sampled, 4.5), expected(path, sampled, 4.5, (2.0, (0,)), (1.5, (1,))))
    assert_close(ask(first, sampled, 4.5), expected(path, sampled, 4.5, (2.0, (0,))))
    assert_close(ask(model, sampled, 4.5), expected(path, sampled, 4.5))


def test_two_prompts_in_one_conditioning(guidance, model, sampled):
    """ConditioningCombine: core averages the predictions, the perturbed ones too."""
    import comfy.samplers

    class Combined(comfy.samplers.CFGGuider):
        def set_conds(self, positive, negative):
            super().set_conds(positive + negative, negative)

    x, (first, second) = sampled
    perturbing = patched(guidance, model)
    together = ask(perturbing, sampled, 1.0, guider=Combined(perturbing))
    alone = [ask(perturbing, (x, captions), 1.0) for captions in ([first, second], [second, first])]
    assert_close(together, sum(alone) / 2)


@pytest.mark.parametrize(
    "sigma, acts", [(0.999, True), (0.85, True), (0.7, False)], ids=["start", "before the end", "after the end"]
)
def test_percents_are_of_the_schedule(guidance, model, path, sampled, sigma, acts):
    """At shift 3 a quarter of the schedule ends at sigma 0.9, half of it at 0.75."""
    result = ask(patched(guidance, model, end_percent=0.5), sampled, 1.0, sigma)
    assert_close(result, expected(path, sampled, 1.0, *([(2.0, (1,))] if acts else []), sigma=sigma))
    late = ask(patched(guidance, model, start_percent=0.25), sampled, 1.0, sigma)
    assert torch.equal(late, ask(model, sampled, 1.0, sigma)) == (sigma > 0.9)


def test_a_later_shift_moves_the_percents(guidance, model, sampled):
    import comfy_extras.nodes_model_advanced as nodes_model_advanced

    perturbing = patched(guidance, model, end_percent=0.5)
    (shifted,) = nodes_model_advanced.ModelSamplingSD3().patch(perturbing, 1.0)  # half of the schedule ends at 0.5
    assert not torch.equal(ask(shifted, sampled, 1.0, 0.7), ask(model, sampled, 1.0, 0.7))


def test_layers_that_are_not_there_are_refused(guidance, model):
    with pytest.raises(ValueError, match=r"blocks \[2\]: expected one or more of 0 to 1"):
        patched(guidance, model, layers="2")
    assert guidance.SanaPAG.validate_inputs(layers="8, 14") is True
    assert guidance.SanaPAG.validate_inputs(layers="") is True
    assert "expected numbers with commas" in guidance.SanaPAG.validate_inputs(layers="middle")


def test_another_model_is_refused(guidance, comfy):
    import comfy.model_patcher

    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match="got a Linear.*connect a Sana model"):
        patched(guidance, other)


@pytest.mark.parametrize("interval, cfg", [(None, 4.5), ((0.5, 0.7), 4.5), ((0.6, 0.7), 1.0), ((0.7, 0.9), 1.0)])
def test_cfg_counts_within_the_interval(guidance, model, path, sampled, interval, cfg):
    rows = []

    def count_rows(apply_model, args):
        rows.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(count_rows)
    guider = guidance.IntervalGuider(model)
    guider.set_interval(interval)
    assert_close(ask(model, sampled, 4.5, guider=guider), expected(path, sampled, cfg))
    assert sum(rows) == (2 if cfg == 1 else 4), "outside of it the negative prompt costs nothing"


def test_an_empty_interval_is_refused(guidance, model):
    with pytest.raises(ValueError, match="interval 0.8 to 0.2 is empty"):
        guidance.IntervalGuider(model).set_interval((0.8, 0.2))


def sampler_guider(part, model, pag_scale, interval):
    return part("nodes.sampling")._guider(model, [], [], 4.5, pag_scale, interval)


def test_the_sampler_perturbs_above_1_and_then_has_no_interval(part, model, caplog):
    off = sampler_guider(part, model, 1.0, (0.2, 0.8))
    assert off.interval == (0.2, 0.8) and "sampler_post_cfg_function" not in off.model_options
    assert sampler_guider(part, model, 1.0, (0.0, 1.0)).interval is None
    on = sampler_guider(part, model, 1.01, (0.2, 0.8))
    assert on.interval is None and len(on.model_options["sampler_post_cfg_function"]) == 1
    assert "interval is ignored" in caplog.text
    assert "sampler_post_cfg_function" not in model.model_options, "the user's MODEL must not change"


def test_wrapped_blocks_take_perturbed_rows(model, path, sampled):
    """The hooks around the blocks pass on what the plain transformer's own call has."""
    x, captions = sampled
    embeds, mask = (torch.cat(parts) for parts in zip(*captions, strict=True))
    arguments = x, torch.tensor([999.0, 321.5]), embeds, mask
    network, perturbation = model.model.diffusion_model, Perturbation((1,), 1)
    with torch.no_grad():
        hooked = super(type(network), network).forward(*arguments, perturbation=perturbation)
        assert_close(hooked, load_transformer(path)(*arguments, perturbation=perturbation))
