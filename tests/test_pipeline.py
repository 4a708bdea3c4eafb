import logging

import pytest
import torch
from PIL import Image

from sana_core import SanaPipeline
from sana_core.finite import require_finite
from sana_core.pictures import to_pictures
from sana_core.sampler.schedule import get_sigmas_flow
from sana_core.sampling import prepare_noise
from tests import tiny

SHORT, LONG = "a red cat", "two green birds sleep under a warm yellow sun, 红色背景左边的熊猫 🐼"
QUICK = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture
def calls(pipe, monkeypatch):
    """What the transformer is called with, one (x, timestep, context) for each call."""
    seen, forward = [], pipe.transformer.forward

    def record(x, timestep, context, **options):
        seen.append((x, timestep, context))
        return forward(x, timestep, context, **options)

    monkeypatch.setattr(pipe.transformer, "forward", record)
    return seen


@pytest.fixture
def poison(pipe, monkeypatch):
    """Makes a part of the pipeline return NaN from its n-th call on."""

    def install(part, method, at_call=1):
        function, count = getattr(part, method), [0]

        def wrapped(*args, **kwargs):
            count[0] += 1
            out = function(*args, **kwargs)
            return out if count[0] < at_call else _poisoned(out)

        monkeypatch.setattr(part, method, wrapped)

    return install


def _poisoned(out):
    return (_poisoned(out[0]), *out[1:]) if isinstance(out, tuple) else out.index_fill(0, torch.tensor([0]), torch.nan)


def test_first_step_is_the_written_out_one(pipe):
    """One call for each caption, with the features as the encoder gives them, and Euler's step."""
    states = []
    pipe(SHORT, "blue", seed=7, num_inference_steps=4, callback=lambda step: states.append(step["x"]))
    x, (sigma, sigma_next) = states[0], get_sigmas_flow(4, 3.0)[:2]
    timestep = torch.tensor([999.0])
    with torch.no_grad():
        cond = pipe.transformer(x, timestep, *pipe.text_encoder.encode(SHORT))
        uncond = pipe.transformer(x, timestep, *pipe.text_encoder.encode("blue", chi=False))
    expected = x + (sigma_next - sigma) * (uncond + 4.5 * (cond - uncond))
    torch.testing.assert_close(states[1], expected, atol=2e-5, rtol=1e-5)


def test_noise_is_what_comfyui_draws(pipe):
    states = []
    pipe([SHORT, LONG], seed=42, callback=lambda step: states.append(step["x"]), **QUICK)
    expected = torch.randn((2, 32, 3, 3), dtype=torch.float32, generator=torch.manual_seed(42), device="cpu")
    assert torch.equal(states[0], expected)


def test_a_seed_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    prepare_noise((1, 2), seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_seed_generator_and_latents_agree(pipe):
    by_seed = pipe(SHORT, seed=5, **QUICK)
    assert torch.equal(pipe(SHORT, seed=5, **QUICK), by_seed)
    assert torch.equal(pipe(SHORT, generator=torch.Generator().manual_seed(5), **QUICK), by_seed)
    assert torch.equal(pipe(SHORT, latents=prepare_noise((1, 32, 3, 3), 5), **QUICK), by_seed)
    assert not torch.equal(pipe(SHORT, seed=6, **QUICK), by_seed)
    assert not torch.equal(pipe(SHORT, **QUICK), pipe(SHORT, **QUICK))


def test_a_batch_of_different_lengths_equals_one_by_one(pipe):
    noise = prepare_noise((3, 32, 3, 3), 11)
    prompts = [SHORT, LONG, ""]
    together = pipe(prompts, "blurry", latents=noise, **QUICK)
    alone = torch.cat(
        [pipe(prompt, "blurry", latents=row, **QUICK) for prompt, row in zip(prompts, noise.split(1), strict=True)]
    )
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_each_picture_may_have_its_own_negative_prompt(pipe):
    noise = prepare_noise((2, 32, 3, 3), 11)
    both = pipe([SHORT, SHORT], ["blurry", LONG], latents=noise, **QUICK)
    second = pipe(SHORT, LONG, latents=noise[1:], **QUICK)
    torch.testing.assert_close(both[1:], second, atol=2e-5, rtol=1e-4)


def test_text_features_replace_the_prompt(pipe):
    embeds, mask = pipe.text_encoder.encode([SHORT, LONG])
    expected = pipe([SHORT, LONG], seed=1, **QUICK)
    assert torch.equal(pipe(prompt_embeds=embeds, prompt_mask=mask, seed=1, **QUICK), expected)
    length = int(mask.sum(1).max())
    shorter = pipe(prompt_embeds=embeds[:, :length], prompt_mask=mask[:, :length].bool(), seed=1, **QUICK)
    torch.testing.assert_close(shorter, expected, atol=2e-5, rtol=1e-4)


def test_guidance_costs_one_call_of_twice_the_rows(pipe, calls):
    pipe([SHORT, LONG], seed=1, **QUICK)
    assert [len(x) for x, _, _ in calls] == [4, 4, 4]
    assert len({id(context) for _, _, context in calls}) == 1
    assert torch.equal(calls[0][0][:2], calls[0][0][2:])


def test_guidance_of_one_needs_no_negative_prompt(pipe, calls):
    pipe([SHORT, LONG], "blurry", seed=1, guidance_scale=1.0, **QUICK)
    assert [len(x) for x, _, _ in calls] == [2, 2, 2]


def test_a_perturbed_first_step_is_the_written_out_one(pipe):
    """Each caption and the perturbed prompt in a call of its own, with the identity for the layer's attention."""
    states, transformer = [], tiny.transformer()
    options = {"pag_guidance_scale": 2.0, "pag_applied_layers": 0, "guidance_scale": 5.0}
    pipe(SHORT, LONG, seed=7, num_inference_steps=4, callback=lambda step: states.append(step["x"]), **options)
    x, (sigma, sigma_next) = states[0], get_sigmas_flow(4, 3.0)[:2]
    timestep = torch.tensor([999.0])
    with torch.no_grad():
        cond = transformer(x, timestep, *pipe.text_encoder.encode(SHORT))
        uncond = transformer(x, timestep, *pipe.text_encoder.encode(LONG, chi=False))
        attention = transformer.blocks[0].attn
        attention.forward = lambda x, *_: attention.proj(attention.qkv(x).chunk(3, dim=-1)[2])
        perturbed = transformer(x, timestep, *pipe.text_encoder.encode(SHORT))
    velocity = uncond + 5 * (cond - uncond) + 2 * (cond - perturbed)
    torch.testing.assert_close(states[1], x + (sigma_next - sigma) * velocity, atol=2e-5, rtol=1e-5)


def test_a_perturbed_batch_equals_one_by_one(pipe):
    noise = prepare_noise((2, 32, 3, 3), 11)
    for scale in (4.5, 1.0):
        options = {**QUICK, "pag_guidance_scale": 2.0, "guidance_scale": scale}
        both = pipe([SHORT, LONG], ["", "blurry"], latents=noise, **options)
        pairs = zip((SHORT, LONG), ("", "blurry"), noise.split(1), strict=True)
        alone = torch.cat([pipe(prompt, negative, latents=row, **options) for prompt, negative, row in pairs])
        torch.testing.assert_close(both, alone, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(both, pipe([SHORT, LONG], ["", "blurry"], latents=noise, **QUICK), atol=1e-3)


def test_perturbed_attention_guidance_is_off_up_to_one(pipe):
    plain = pipe(SHORT, seed=1, **QUICK)
    assert torch.equal(pipe(SHORT, seed=1, pag_guidance_scale=1.0, pag_applied_layers=[0], **QUICK), plain)
    own = tiny.TRANSFORMER.perturbed_layer
    default = pipe(SHORT, seed=1, pag_guidance_scale=1.5, **QUICK)
    assert torch.equal(pipe(SHORT, seed=1, pag_guidance_scale=1.5, pag_applied_layers=[own], **QUICK), default)
    assert not torch.equal(pipe(SHORT, seed=1, pag_guidance_scale=1.5, pag_applied_layers=[0], **QUICK), default)


def test_guidance_counts_within_its_interval(pipe, calls, caplog):
    """Sigmas of three steps at shift 3: 0.9997, 0.857, 0.6."""
    pipe([SHORT, LONG], "blurry", seed=1, guidance_interval=(0.7, 0.9), **QUICK)
    assert [len(x) for x, _, _ in calls] == [2, 4, 2]
    nowhere = pipe([SHORT, LONG], "blurry", seed=1, guidance_interval=(0.1, 0.2), **QUICK)
    without = pipe([SHORT, LONG], seed=1, guidance_scale=1, **QUICK)
    torch.testing.assert_close(nowhere, without, atol=2e-5, rtol=1e-4)
    everywhere = pipe(SHORT, seed=1, guidance_interval=(0, 1), **QUICK)
    assert torch.equal(everywhere, pipe(SHORT, seed=1, **QUICK))
    assert not caplog.text
    perturbed = pipe(SHORT, seed=1, pag_guidance_scale=2.0, **QUICK)
    assert torch.equal(pipe(SHORT, seed=1, pag_guidance_scale=2.0, guidance_interval=(0.1, 0.2), **QUICK), perturbed)
    assert "interval is ignored" in caplog.text


@pytest.mark.parametrize("sampler, whole", [("flow_dpm-solver", True), ("flow_euler", False)])
def test_timesteps_are_whole_for_flow_dpm_solver_only(pipe, calls, sampler, whole):
    pipe(SHORT, seed=1, sampler=sampler, **QUICK)
    timesteps = torch.cat([timestep for _, timestep, _ in calls])
    assert torch.equal(timesteps, timesteps.floor()) == whole
    assert timesteps[0] == (999 if whole else 1000)


def test_models_that_scale_the_timestep_get_fractions(calls, pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "config", tiny.transformer(timestep_scale=0.001).config)
    pipe(SHORT, seed=1, num_inference_steps=2, output_type="latent")
    assert calls[0][1][0].item() == pytest.approx(999.666, abs=1e-3)


def test_shift_is_the_argument_then_the_pipelines_then_the_models(calls, pipe):
    other = SanaPipeline(pipe.transformer, pipe.vae, pipe.text_encoder, shift=6.0)
    for run, options in ((pipe, {}), (other, {}), (other, {"shift": 2.0})):
        run(SHORT, seed=1, num_inference_steps=2, output_type="latent", **options)
    second = [int(timestep[0]) for _, timestep, _ in calls[1::2]]
    assert second == [int(1000 * get_sigmas_flow(2, shift)[1]) for shift in (3.0, 6.0, 2.0)]


def test_instruction_can_be_replaced_or_left_out(pipe):
    results = [pipe(SHORT, seed=1, complex_human_instruction=value, **QUICK) for value in (True, "Draw this: ", False)]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    embeds, mask = pipe.text_encoder.encode(SHORT, chi="Draw this: ")
    assert torch.equal(pipe(prompt_embeds=embeds, prompt_mask=mask, seed=1, **QUICK), results[1])


def test_output_types_agree(pipe):
    options = {"seed": 1, "num_inference_steps": 2, "height": 64, "width": 128}
    latents = pipe([SHORT, LONG], output_type="latent", **options)
    pixels = pipe([SHORT, LONG], output_type="pt", **options)
    pictures = pipe([SHORT, LONG], **options)
    assert latents.shape == (2, 32, 2, 4) and latents.dtype == torch.float32
    assert pixels.shape == (2, 3, 64, 128) and pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.01
    with torch.no_grad():
        raw = pipe.vae.decode(latents / 0.41407)
    torch.testing.assert_close(pixels, (raw / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert [picture.size for picture in pictures] == [(128, 64)] * 2
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in to_pictures(pixels)]


def test_tiles_make_the_same_picture(pipe):
    options = {**QUICK, "seed": 1, "output_type": "pt"}
    whole, in_tiles = (pipe(SHORT, vae_tiling=tiling, **options) for tiling in (False, True))
    torch.testing.assert_close(in_tiles, whole, atol=1e-6, rtol=0)


def test_pictures_keep_colours_and_orientation():
    pixels = torch.zeros(1, 3, 2, 4)
    pixels[0, 0, 0, 3], pixels[0, 1, 1, 0] = 1.0, 0.5
    (picture,) = to_pictures(pixels)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    assert picture.getpixel((3, 0)) == (255, 0, 0)
    assert picture.getpixel((0, 1)) == (0, 128, 0)


def test_the_models_own_size_is_the_default(pipe):
    assert pipe(SHORT, seed=1, **QUICK).shape == (1, 32, 3, 3)
    assert pipe(SHORT, seed=1, height=32, **QUICK).shape == (1, 32, 1, 3)


def test_narrow_weights_keep_wide_latents():
    pipe = SanaPipeline(tiny.transformer().bfloat16(), tiny.dc_ae().bfloat16(), tiny.text_encoder())
    states = []
    latents = pipe(SHORT, seed=1, callback=lambda step: states.append(step["x"]), **QUICK)
    assert {state.dtype for state in states} == {latents.dtype} == {torch.float32}
    assert pipe.decode(latents).isfinite().all()


def test_callback_sees_every_step_and_can_stop(pipe):
    steps = []
    pipe(SHORT, seed=1, num_inference_steps=4, output_type="latent", callback=lambda step: steps.append(step["i"]))
    assert steps == [0, 1, 2, 3]

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(SHORT, seed=1, callback=stop, **QUICK)


def test_nothing_records_gradients(pipe):
    assert not pipe(SHORT, seed=1, **QUICK).requires_grad


def test_empty_prompt_is_drawn_with_a_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        assert pipe(["", SHORT], seed=1, **QUICK).isfinite().all()
    assert "prompt is empty" in caplog.text
    caplog.clear()
    pipe(SHORT, seed=1, **QUICK)
    assert "prompt is empty" not in caplog.text


@pytest.mark.parametrize(
    "part, method, at_call, stage",
    [
        ("text_encoder", "encode", 1, "text encoder"),
        ("transformer", "forward", 3, "transformer at step 3"),
        ("vae", "decode", 1, "DC-AE decoder"),
    ],
)
def test_nan_is_reported_with_its_stage(pipe, poison, part, method, at_call, stage):
    poison(getattr(pipe, part), method, at_call)
    with pytest.raises(FloatingPointError, match=f"{stage} returned NaN"):
        pipe(SHORT, seed=1, num_inference_steps=4)


def test_infinity_is_no_picture_either():
    with pytest.raises(FloatingPointError, match="the test returned NaN or infinity in 1 of 4 values"):
        require_finite(torch.tensor([0.0, 1.0, -torch.inf, 2.0]), "the test")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": SHORT, "height": 100}, "96x100 picture.*multiples of 32.*96x96 or 96x128"),
        ({"prompt": SHORT, "width": 0}, "nearest sizes are"),
        ({"prompt": SHORT, "output_type": "np"}, "output_type is 'np'"),
        ({"prompt": SHORT, "sampler": "ddim"}, "no sampler 'ddim'; there are flow_dpm-solver, flow_euler"),
        ({"prompt": SHORT, "num_inference_steps": 0}, "0 sampling steps"),
        ({"prompt": SHORT, "shift": -1.0}, "shift is -1"),
        ({"prompt": SHORT, "pag_applied_layers": [0, 2]}, r"blocks \[0, 2\]: expected one or more of 0 to 1"),
        ({"prompt": SHORT, "pag_applied_layers": "transformer_blocks.1"}, "expected one or more of 0 to 1"),
        ({"prompt": SHORT, "guidance_interval": (0.8, 0.2)}, "guidance interval 0.8 to 0.2 is empty"),
        ({"prompt": []}, "list of prompts is empty"),
        ({}, "give a prompt or prompt_embeds"),
        ({"prompt": SHORT, "prompt_embeds": torch.zeros(1, 5, 32)}, "one of the two"),
        ({"prompt_embeds": torch.zeros(1, 5, 32)}, r"prompt_mask None do not fit: expected \[B, L, 32\]"),
        ({"prompt_embeds": torch.zeros(1, 5, 16), "prompt_mask": torch.ones(1, 5)}, r"\(1, 5, 16\)"),
        ({"prompt": [SHORT] * 3, "negative_prompt": ["a", "b"]}, "2 negative prompts for 3 pictures"),
        ({"prompt": SHORT, "seed": 1, "latents": torch.zeros(1, 32, 3, 3)}, "exclude each other"),
        ({"prompt": SHORT, "latents": torch.zeros(2, 32, 3, 3)}, r"shape \(2, 32, 3, 3\), expected \(1, 32, 3, 3\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    "transformer, message",
    [
        ({"in_channels": 16}, "latents of 16 channels, the autoencoder makes 32"),
        ({"caption_channels": 48}, "text features of 48 channels, the text encoder gives 32"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(pipe, transformer, message):
    with pytest.raises(ValueError, match=message):
        SanaPipeline(tiny.transformer(**transformer), pipe.vae, pipe.text_encoder)
