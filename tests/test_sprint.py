"""The pipeline with a Sana-Sprint transformer, against diffusers' pipelines with the same random weights."""

import logging
import math

import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline, SanaSprintPipeline, SCMScheduler
from PIL import Image

from sana_core import SanaPipeline
from sana_core.checkpoint import save_dc_ae, save_text_encoder, save_transformer
from sana_core.pictures import to_pixels
from sana_core.sampler.scm import get_sigmas_scm
from sana_core.sampling import prepare_noise
from tests import tiny, twin

SHORT, LONG = "a red cat", "two green birds sleep under a warm yellow sun, 红色背景左边的熊猫 🐼"
SIZE = {"height": 64, "width": 96}
SHAPE = (2, 32, 2, 3)
LATENT = SIZE | {"output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.sprint(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture(scope="module")
def diffusers_parts(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    return {
        "transformer": twin.transformer(pipe.transformer, folder / "transformer"),
        "vae": twin.dc_ae(pipe.vae, folder / "vae"),
        "scheduler": SCMScheduler(),
        "text_encoder": None,
        "tokenizer": None,
    }


@pytest.fixture(scope="module")
def captions(pipe):
    embeds, mask = pipe.text_encoder.encode([SHORT, LONG])
    assert len(set(mask.sum(1).tolist())) == 2, "the captions are to differ in length"
    return embeds, mask


@pytest.fixture(scope="module")
def picture():
    pixels = torch.randint(0, 256, (3, 4, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((192, 128), Image.Resampling.BICUBIC)


def theirs(kind, parts, captions, **options):
    """Pixels and latents that diffusers draws; both take the same noise."""
    run = kind(**parts)
    run.set_progress_bar_config(disable=True)
    embeds, mask = captions
    options |= SIZE | {"prompt_embeds": embeds, "prompt_attention_mask": mask, "use_resolution_binning": False}
    return [
        run(**options, generator=torch.Generator().manual_seed(5), output_type=output).images
        for output in ("pt", "latent")
    ]


def ours(pipe, captions, **options):
    embeds, mask = captions
    options |= SIZE | {"prompt_embeds": embeds, "prompt_mask": mask, "seed": 5}
    return [pipe(**options, output_type=output) for output in ("pt", "latent")]


def assert_same(mine, expected):
    for actual, other in zip(mine, expected, strict=True):
        assert actual.shape == other.shape and other.std() > 0.01
        error = (actual - other).abs().max() / other.abs().max()
        assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("steps, guidance", [(1, 4.5), (2, 4.5), (2, 2.0), (4, 4.5)])
def test_draws_what_diffusers_draws(pipe, diffusers_parts, captions, steps, guidance):
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    middle = {"intermediate_timesteps": 1.3 if steps == 2 else None}
    expected = theirs(SanaSprintPipeline, diffusers_parts, captions, **options, **middle)
    assert_same(ours(pipe, captions, **options), expected)


def test_own_timesteps_and_noise_as_in_diffusers(pipe, diffusers_parts, captions):
    latents = prepare_noise(SHAPE, 9)
    other = {"max_timesteps": 1.2, "intermediate_timesteps": 0.7}
    expected = theirs(SanaSprintPipeline, diffusers_parts, captions, latents=latents, **other)
    assert_same(ours(pipe, captions, latents=latents, timesteps=[1.2, 0.7, 0]), expected)


@pytest.mark.parametrize("steps, strength", [(2, 0.5), (4, 0.7), (4, 0.25), (2, 1.0)])
def test_image_to_image_as_in_diffusers(pipe, diffusers_parts, captions, picture, steps, strength):
    options = {"image": picture, "strength": strength, "num_inference_steps": steps}
    middle = {"intermediate_timesteps": 1.3 if steps == 2 else None}
    expected = theirs(SanaSprintImg2ImgPipeline, diffusers_parts, captions, **options, **middle)
    assert_same(ours(pipe, captions, **options), expected)


def test_two_steps_and_4_5_are_the_defaults(pipe, captions):
    default = ours(pipe, captions)[1]
    assert pipe.default_steps == 2
    assert torch.equal(default, ours(pipe, captions, num_inference_steps=2, guidance_scale=4.5)[1])
    assert torch.equal(default, ours(pipe, captions, timesteps=[1.5708, 1.3, 0])[1])


def test_guidance_is_an_input_and_costs_no_rows(pipe, monkeypatch):
    seen, forward = [], pipe.transformer.forward

    def record(x, timestep, context, guidance, **options):
        seen.append((x.shape, timestep.tolist(), guidance.tolist()))
        return forward(x, timestep, context, guidance=guidance, **options)

    monkeypatch.setattr(pipe.transformer, "forward", record)
    pipe([SHORT, LONG], seed=1, guidance_scale=3.5, **LATENT)
    levels = get_sigmas_scm(2).tolist()
    assert seen == [(torch.Size(SHAPE), [levels[i]] * 2, [3.5, 3.5]) for i in range(2)]


def test_a_batch_equals_one_by_one(pipe):
    noise = prepare_noise(SHAPE, 11)
    together = pipe([SHORT, LONG], latents=noise, num_inference_steps=1, **LATENT)
    alone = [
        pipe(prompt, latents=row, num_inference_steps=1, **LATENT)
        for prompt, row in zip([SHORT, LONG], noise.split(1), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_a_seed_settles_everything(pipe):
    torch.manual_seed(1)
    by_seed = pipe(SHORT, seed=5, num_inference_steps=4, **LATENT)
    torch.manual_seed(2)
    assert torch.equal(pipe(SHORT, seed=5, num_inference_steps=4, **LATENT), by_seed)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(pipe(SHORT, generator=generator, num_inference_steps=4, **LATENT), by_seed)
    assert not torch.equal(pipe(SHORT, seed=6, num_inference_steps=4, **LATENT), by_seed)
    noise = prepare_noise((1, *SHAPE[1:]), 5)
    first, second = (pipe(SHORT, latents=noise, seed=seed, **LATENT) for seed in (1, 2))
    assert not torch.equal(first, second), "the second step's noise comes from the seed"


def test_an_image_may_be_a_picture_pixels_or_latents(pipe, picture):
    pixels = to_pixels(picture, 64, 96)
    with torch.no_grad():
        latents = pipe.vae.encode(2 * pixels - 1) * pipe.vae.config.scaling_factor
    images = (picture, [picture, picture], pixels, latents, latents.expand(SHAPE))
    drawn = [pipe([SHORT, LONG], image=image, seed=3, **LATENT) for image in images]
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], atol=1e-5, rtol=1e-5)


def test_the_first_angle_says_how_much_noise_an_image_gets(pipe):
    image, states = torch.full((1, *SHAPE[1:]), 2.0), []
    options = {"timesteps": [math.pi / 4, 0.2, 0], "strength": 1.0, "callback": lambda step: states.append(step["x"])}
    pipe(SHORT, image=image, seed=3, **options, **LATENT)
    torch.testing.assert_close(states[0], 0.5 * image + 0.5 * prepare_noise(image.shape, 3))


def test_a_strength_that_ignores_the_image_is_said(pipe, picture, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(SHORT, image=picture, seed=3, strength=0.5, **LATENT)
        assert not caplog.records
        pipe(SHORT, image=picture, seed=3, strength=0.6, **LATENT)
    assert "strength of 0.6 leaves all 2 steps" in caplog.text


def test_narrow_weights_keep_wide_latents(picture):
    pipe = SanaPipeline(tiny.sprint().bfloat16(), tiny.dc_ae().bfloat16(), tiny.text_encoder())
    states = []
    latents = pipe(SHORT, seed=1, image=picture, callback=lambda step: states.append(step["x"]), **LATENT)
    assert {state.dtype for state in states} == {latents.dtype} == {torch.float32}
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "0 sampling steps.*1 to 4"),
        ({"negative_prompt": "blurry"}, "negative_prompt given, which Sana-Sprint has no use for"),
        ({"shift": 3.0, "negative_prompt": "blurry"}, "negative_prompt and shift given"),
        (
            {"pag_guidance_scale": 2.0, "guidance_interval": (0.1, 0.9)},
            "pag_guidance_scale and guidance_interval given",
        ),
        ({"pag_applied_layers": 1}, "pag_applied_layers given"),
        ({"timesteps": [1.5, 1.0]}, "timesteps are 1.5, 1;"),
        ({"timesteps": [1.5, 0], "num_inference_steps": 2}, "2 timesteps for 2 steps"),
        ({"image": torch.zeros(1, 3, 64, 96), "strength": 0.0}, "strength is 0"),
        ({"image": torch.zeros(3, 3, 64, 96)}, r"image has shape \(3, 3, 64, 96\), expected \(1, 3, 64, 96\) or"),
        ({"image": torch.zeros(1, 32, 3, 3)}, r"or \(1, 32, 2, 3\)"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude each other"),
        ({"latents": torch.zeros(2, 32, 2, 3)}, "latents have shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(SHORT, **SIZE, **arguments)


def test_a_broken_image_is_reported(pipe):
    with pytest.raises(FloatingPointError, match="made the image"):
        pipe(SHORT, image=torch.full((1, 3, 64, 96), torch.nan), **SIZE)


def test_other_models_refuse_what_is_sprints():
    base = SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())
    with pytest.raises(ValueError, match="timesteps given, which a Sana model other than Sprint"):
        base(SHORT, timesteps=[1.5, 0], **SIZE)


def test_files_and_folders_are_known_as_sprint(pipe, tmp_path):
    save_transformer(pipe.transformer, tmp_path / "transformer", layout="diffusers")
    save_dc_ae(pipe.vae, tmp_path / "vae", layout="diffusers")
    save_text_encoder(pipe.text_encoder, tmp_path / "text_encoder" / "model.safetensors")
    expected = pipe(LONG, seed=1, **LATENT)
    loaded = SanaPipeline.from_pretrained(tmp_path, device="cpu")
    assert loaded.is_sprint
    assert torch.equal(loaded(LONG, seed=1, **LATENT), expected)
    save_transformer(pipe.transformer, tmp_path / "sprint.safetensors")
    paths = {"transformer": tmp_path / "sprint.safetensors", "vae": tmp_path / "vae"}
    loaded = SanaPipeline.from_files(**paths, text_encoder=tmp_path / "text_encoder", device="cpu")
    assert torch.equal(loaded(LONG, seed=1, **LATENT), expected)
