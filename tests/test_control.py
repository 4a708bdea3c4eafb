"""ControlNet in the pipeline and on the command line."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

from sana_core import SanaPipeline
from sana_core.__main__ import main
from sana_core.checkpoint import load_controlnet, read_state_dict, save_controlnet, save_transformer
from sana_core.models.controlnet import Control
from sana_core.models.sana import ContextCache, Perturbation
from sana_core.pictures import METADATA_KEY, to_pixels
from sana_core.sampling import prepare_noise
from tests import tiny, twin

PROMPTS = ["a red cat", "two green birds sleep under a warm yellow sun"]
ONE_STEP = {"num_inference_steps": 1, "sampler": "flow_euler", "output_type": "latent", "seed": 7}
SCALE = 0.41407


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder(), controlnet=tiny.controlnet())


@pytest.fixture(scope="module")
def plain():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


@pytest.fixture
def lines():
    """White lines on black, of another size than the drawing."""
    picture = Image.new("L", (130, 150))
    ImageDraw.Draw(picture).line((10, 10, 120, 110), fill=255, width=9)
    return picture


@pytest.fixture(scope="module")
def files(tiny_models):
    return {
        "transformer": tiny_models / "diffusion_models" / "tiny.safetensors",
        "vae": tiny_models / "vae" / "tiny.safetensors",
        "text-encoder": tiny_models / "text_encoders" / "tiny.safetensors",
    }


def hint_of(pipe, picture):
    return SCALE * pipe.vae.encode(2 * to_pixels(picture, 96, 96) - 1)


def one_euler_step(pipe, hint, strength=1.0, cfg=4.5, pag=0.0):
    """From noise at level 1 to 0, written out."""
    noise = prepare_noise((len(PROMPTS), 32, 3, 3), 7)
    control = [Control(pipe.controlnet, hint, strength)]

    def velocity(prompts, chi):
        embeds, mask = pipe.text_encoder.encode(prompts, chi=chi)
        perturbation = Perturbation((1,), len(noise))
        timestep = torch.full((len(noise),), 1000.0)
        rows = pipe.transformer(noise, timestep, embeds, mask, perturbation=perturbation, control=control)
        return rows.chunk(2)

    cond, perturbed = velocity(PROMPTS, True)
    uncond, _ = velocity(["", ""], False)
    return noise - (uncond + cfg * (cond - uncond) + pag * (cond - perturbed))


def assert_close(actual, wanted):
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


def differs(one, other):
    return (one - other).abs().max() > 1e-2 * other.abs().max()


@pytest.mark.parametrize("pag", [0.0, 2.0])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@torch.no_grad()
def test_a_step_is_the_written_out_one(pipe, plain, lines, strength, pag):
    """Both captions are controlled, and the perturbed prediction too."""
    options = {"control_strength": strength, "pag_guidance_scale": pag}
    drawn = pipe(PROMPTS, control_image=lines, **options, **ONE_STEP)
    assert_close(drawn, one_euler_step(pipe, hint_of(pipe, lines), strength, pag=pag))
    assert differs(drawn, plain(PROMPTS, pag_guidance_scale=pag, **ONE_STEP))


@torch.no_grad()
def test_one_picture_each(pipe, lines):
    pictures = [lines, lines.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    drawn = pipe(PROMPTS, control_image=pictures, **ONE_STEP)
    assert_close(drawn, one_euler_step(pipe, torch.cat([hint_of(pipe, picture) for picture in pictures])))
    assert differs(drawn, pipe(PROMPTS, control_image=lines, **ONE_STEP))


@pytest.mark.parametrize("pictures", [1, 2])
def test_outside_of_the_guidance_interval_it_counts_too(pipe, plain, lines, pictures):
    """There the prompt alone is asked: half as many rows."""
    options = ONE_STEP | {"num_inference_steps": 3, "guidance_interval": (0.0, 0.5)}
    drawn = pipe(PROMPTS, control_image=[lines] * pictures, **options)
    assert differs(drawn, plain(PROMPTS, **options))
    assert_close(drawn, pipe(PROMPTS, control_image=lines, **options))


def test_pixels_and_latents_for_a_picture(pipe, lines):
    drawn = pipe(PROMPTS, control_image=lines, **ONE_STEP)
    pixels = to_pixels(lines, 96, 96)
    for given in (pixels, pixels.expand(2, -1, -1, -1), hint_of(pipe, lines)):
        assert_close(pipe(PROMPTS, control_image=given.detach(), **ONE_STEP), drawn)


def test_no_picture_or_no_strength_is_no_control(pipe, plain, lines):
    expected = plain(PROMPTS, **ONE_STEP)
    assert torch.equal(pipe(PROMPTS, **ONE_STEP), expected)
    assert torch.equal(pipe(PROMPTS, control_image=lines, control_strength=0.0, **ONE_STEP), expected)


def test_together_with_an_image_and_a_mask(pipe, lines):
    mask = Image.new("L", (96, 96))
    mask.paste(255, (0, 0, 96, 32))
    options = {"seed": 7, "num_inference_steps": 3, "output_type": "pt", "image": lines, "mask": mask}
    controlled, free = pipe("a red cat", control_image=lines, **options), pipe("a red cat", **options)
    assert differs(controlled[:, :, :32], free[:, :, :32])
    assert torch.equal(controlled[:, :, 32:], free[:, :, 32:])


def test_sprint_takes_it(lines):
    pipe = SanaPipeline(tiny.sprint(), tiny.dc_ae(), tiny.text_encoder(), controlnet=tiny.controlnet(qk_norm=True))
    options = {"seed": 7, "output_type": "latent"}
    assert differs(pipe(PROMPTS, control_image=lines, **options), pipe(PROMPTS, **options))


def test_what_does_not_fit_is_refused(pipe, plain, lines, tmp_path):
    with pytest.raises(ValueError, match="there is no ControlNet to read it: use load_controlnet"):
        plain("a red cat", control_image=lines)
    with pytest.raises(ValueError, match=r"the control_image has shape \(1, 3, 64, 96\), expected \(1, 3, 96, 96\)"):
        pipe("a red cat", control_image=torch.zeros(1, 3, 64, 96))
    with pytest.raises(FloatingPointError, match="whatever made the control_image"):
        pipe("a red cat", control_image=torch.full((1, 3, 96, 96), torch.nan))
    narrow = tiny.controlnet(hidden_size=32, num_cross_heads=1)
    with pytest.raises(ValueError, match="is 32 wide"):
        SanaPipeline(plain.transformer, plain.vae, plain.text_encoder, controlnet=narrow)
    save_controlnet(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="is 32 wide"):
        plain.load_controlnet(tmp_path / "narrow.safetensors")
    assert plain.controlnet is None


def test_loading_follows_the_transformers_dtype(tmp_path):
    save_controlnet(tiny.controlnet(), tmp_path / "net.safetensors")
    pipe = SanaPipeline(tiny.transformer().to(torch.bfloat16), tiny.dc_ae(), tiny.text_encoder())
    pipe.load_controlnet(tmp_path / "net.safetensors")
    assert pipe.controlnet.controlnet[0].after_proj.weight.dtype == torch.bfloat16


def test_diffusers_folder_with_a_controlnet(files, pipe, lines, tmp_path):
    from sana_core.checkpoint import save_dc_ae

    save_transformer(tiny.transformer(), tmp_path / "transformer", layout="diffusers")
    save_dc_ae(tiny.dc_ae(), tmp_path / "vae", layout="diffusers")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").symlink_to(files["text-encoder"])
    twin.controlnet(tiny.controlnet(), tiny.transformer()).save_pretrained(tmp_path / "controlnet")
    options = ONE_STEP | {"height": 96, "width": 96}
    drawn = SanaPipeline.from_pretrained(tmp_path)(PROMPTS, control_image=lines, **options)
    assert_close(drawn, pipe(PROMPTS, control_image=lines, **options))


@pytest.fixture
def command(files, tiny_models, lines, tmp_path):
    lines.save(tmp_path / "lines.png")
    given = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    return ["generate", "--prompt", "a red cat", "--seed", "7", "--steps", "2", *given], {
        "net": str(tiny_models / "controlnet" / "tiny.safetensors"), "picture": str(tmp_path / "lines.png"),
        "output": str(tmp_path / "drawn.png"),
    }  # fmt: skip


def test_generate_is_the_pipeline(command, pipe, lines):
    words, paths = command
    control = ["--controlnet", paths["net"], "--control-image", paths["picture"], "--control-strength", "0.7"]
    assert main([*words, *control, "--output", paths["output"]]) == 0
    drawn = Image.open(paths["output"])
    options = {"seed": 7, "num_inference_steps": 2, "control_strength": 0.7}
    assert drawn.tobytes() == pipe("a red cat", control_image=lines, **options)[0].tobytes()
    notes = json.loads(drawn.text[METADATA_KEY])
    assert (notes["control_image"], notes["control_strength"]) == ("lines.png", 0.7)
    assert notes["models"]["controlnet"] == "tiny.safetensors"


@pytest.mark.parametrize(
    "given, words",
    [
        (("--controlnet", "net"), "belong together"),
        (("--control-image", "picture"), "belong together"),
        (("--control-strength", "0.5"), "--control-strength given without"),
    ],
)
def test_half_of_the_options_is_refused_before_anything_loads(command, given, words, capsys):
    first, paths = command
    assert main([*first, given[0], paths.get(given[1], given[1]), "--output", paths["output"]]) != 0
    assert words in capsys.readouterr().err


def test_convert_writes_the_branch_alone(tmp_path, capsys):
    net = tiny.controlnet()
    torch.save({"state_dict": {**tiny.transformer().state_dict(), **net.state_dict()}}, tmp_path / "whole.pth")
    (tmp_path / "config.json").write_text(json.dumps(twin.controlnet_config(net.config)))
    output = tmp_path / "branch" / "net.safetensors"
    words = ["convert", "controlnet", str(tmp_path / "whole.pth"), str(output), "--to"]
    assert main([*words, "official", "--dtype", "bfloat16"]) == 0
    written, _ = read_state_dict(output)
    assert written.keys() == net.state_dict().keys()
    assert load_controlnet(output).config == net.config
    assert main([*words, "diffusers"]) == 1
    assert 'layout "official"' in capsys.readouterr().err


def test_captions_are_prepared_for_the_branch_once(pipe, lines, monkeypatch):
    """For all steps, captions of both sides and perturbed rows; the picture is that of preparing at each step."""
    prepared, make = [], pipe.controlnet.prepare_context
    monkeypatch.setattr(pipe.controlnet, "prepare_context", lambda context: prepared.append(1) or make(context))
    options = {"control_image": lines, "num_inference_steps": 3, "output_type": "latent", "seed": 7}
    options |= {"pag_guidance_scale": 2.0, "pag_applied_layers": 0}
    once = pipe(PROMPTS[0], **options)
    assert prepared == [1]
    monkeypatch.setattr(ContextCache, "of_branch", lambda cache, net: net.prepare_context(cache.features))
    assert torch.equal(pipe(PROMPTS[0], **options), once)
    assert len(prepared) > 2
