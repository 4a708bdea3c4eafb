import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Gemma2Model

from sana_core import SanaPipeline
from sana_core.__main__ import main
from sana_core.checkpoint import load_dc_ae, load_transformer, read_state_dict, save_transformer
from sana_core.commands.models import NANO_FILES
from sana_core.pictures import write_png
from sana_core.styles import apply_style
from tests import loras, tiny

ROOT = Path(__file__).parents[1]
PROMPT = "a red cat, 红色背景左边的熊猫 🐼"


@pytest.fixture
def model_options(files):
    options = [("--" + name.replace("_", "-"), str(path)) for name, path in files.items()]
    return [word for option in options for word in option] + ["--device", "cpu", "--steps", "2"]


def metadata_of(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["sana"])


def test_generate_in_a_process_of_its_own(model_options, files, tmp_path):
    """The whole way: prompt to PNG, in a folder that does not exist yet, with the settings in a tEXt chunk."""
    target = tmp_path / "new" / "panda.png"
    command = ["generate", *model_options, "--prompt", PROMPT, "--seed", "3", "--width", "64", "--output", str(target)]
    result = subprocess.run(
        [sys.executable, "-m", "sana_core", *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{target}\n"
    assert list(target.parent.iterdir()) == [target]
    assert b"tEXtsana\0" in target.read_bytes()
    assert metadata_of(target) == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "pag_guidance_scale": 1.0,
        "pag_applied_layers": None,
        "guidance_interval": None,
        "sampler": "flow_dpm-solver",
        "shift": 3.0,
        "complex_human_instruction": True,
        "seed": 3,
        "width": 64,
        "height": 96,
        "models": {name: path.name for name, path in files.items()},
    }
    (expected,) = SanaPipeline.from_files(**files, device="cpu")(PROMPT, width=64, num_inference_steps=2, seed=3)
    with Image.open(target) as picture:
        assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize("guidance", ["--pag-scale 2 --pag-layers 0,1", "--guidance-interval 0.2 0.9"])
def test_metadata_is_enough_to_draw_the_picture_again(model_options, files, tmp_path, capsys, guidance):
    extra = ["--negative-prompt", "blurry", "--sampler", "flow_euler", "--shift", "2", "--guidance-scale", "3"]
    extra += guidance.split()
    output = tmp_path / "random.png"
    assert (
        main(["generate", *model_options, *extra, "--no-instruction", "--prompt", PROMPT, "--output", str(output)]) == 0
    )
    settings = metadata_of(output)
    del settings["models"]
    given = [settings[name] for name in ("pag_guidance_scale", "pag_applied_layers", "guidance_interval")]
    assert given == ([2.0, [0, 1], None] if "pag" in guidance else [1.0, None, [0.2, 0.9]])
    (again,) = SanaPipeline.from_files(**files, device="cpu")(**settings)
    with Image.open(output) as picture:
        assert picture.tobytes() == again.tobytes()


def test_a_style_is_applied_to_both_prompts_and_noted(model_options, files, tmp_path, capsys):
    output = tmp_path / "out.png"
    command = ["generate", *model_options, "--prompt", "a cat", "--seed", "3", "--output", str(output)]
    assert main([*command, "--negative-prompt", "blurry", "--style", "Pixel art"]) == 0
    notes = metadata_of(output)
    assert notes["style"] == "Pixel art"
    prompt, negative = apply_style("Pixel art", "a cat", "blurry")
    assert (notes["prompt"], notes["negative_prompt"]) == (prompt, negative)
    pipe = SanaPipeline.from_files(**files, device="cpu")
    (expected,) = pipe(prompt, negative, num_inference_steps=2, seed=3)
    with Image.open(output) as picture:
        assert picture.tobytes() == expected.tobytes()


def test_sprint_takes_a_style_for_its_only_prompt(model_options, tiny_models, tmp_path, capsys):
    output = tmp_path / "out.png"
    model_options[model_options.index("--transformer") + 1] = str(
        tiny_models / "diffusion_models" / "sprint.safetensors"
    )
    command = ["generate", *model_options, "--prompt", "a cat", "--style", "Manga", "--output", str(output)]
    assert main(command) == 0, capsys.readouterr().err
    notes = metadata_of(output)
    assert notes["prompt"] == apply_style("Manga", "a cat")[0] and "negative_prompt" not in notes


def test_a_negative_prompt_is_encoded_once_for_all_prompts(model_options, tmp_path, monkeypatch, capsys):
    calls = []
    forward = Gemma2Model.forward
    monkeypatch.setattr(Gemma2Model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    prompts = [word for prompt in ("a cat", "the sea", "a cat") for word in ("--prompt", prompt)]
    assert main(["generate", *model_options, *prompts, "--negative-prompt", "blurry", "--output", str(tmp_path)]) == 0
    assert len(calls) == 3, "two prompts and one negative prompt"


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(model_options, tmp_path, caplog, capsys):
    prompt = " ".join(f"word{number}" for number in range(200))
    assert main(["generate", *model_options, "--prompt", prompt, "--output", str(tmp_path)]) == 0
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "the text encoder takes 299" in warning.getMessage() and "was left out, from" in warning.getMessage()


def test_loras_are_added_and_noted(model_options, files, tmp_path, capsys):
    layers = loras.factors(tiny.transformer(), ["blocks.1.attn.qkv"])
    paths = [tmp_path / "a:1.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file(loras.flat(layers), path)
    output = tmp_path / "out.png"
    command = ["generate", *model_options, "--prompt", "a cat", "--seed", "3", "--output", str(output)]
    assert main([*command, "--lora", str(paths[0]), "--lora", f"{paths[1]}:-0.5"]) == 0
    assert metadata_of(output)["loras"] == [["a:1.safetensors", 1.0], ["b.safetensors", -0.5]]
    pipe = SanaPipeline.from_files(**files, device="cpu")
    (plain,) = pipe("a cat", num_inference_steps=2, seed=3)
    pipe.load_lora(paths[0], 1.0)
    pipe.load_lora(paths[1], -0.5)
    (expected,) = pipe("a cat", num_inference_steps=2, seed=3)
    with Image.open(output) as picture:
        assert picture.tobytes() == expected.tobytes() != plain.tobytes()
    assert main([*command, "--lora", str(files["vae"])]) == 1
    assert "it looks like a DC-AE autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize("word, tiling", [("auto", None), ("always", True), ("never", False)])
def test_tiling_reaches_the_decoder(model_options, tmp_path, monkeypatch, word, tiling):
    asked, decode = [], SanaPipeline.decode

    def record(pipe, latents, *, vae_tiling):
        asked.append(vae_tiling)
        return decode(pipe, latents, vae_tiling=vae_tiling)

    monkeypatch.setattr(SanaPipeline, "decode", record)
    output = str(tmp_path / "cat.png")
    assert main(["generate", *model_options, "--vae-tiling", word, "--prompt", "a cat", "--output", output]) == 0
    assert asked == [tiling]


def test_each_prompt_gets_the_next_free_name(model_options, tmp_path, capsys):
    (tmp_path / "sana_00007.png").write_bytes(b"kept")
    command = ["generate", *model_options, "--prompt", "a cat", "--prompt", "a bird", "--output", str(tmp_path)]
    assert main(command) == 0
    paths = [tmp_path / "sana_00008.png", tmp_path / "sana_00009.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert [metadata_of(path)["prompt"] for path in paths] == ["a cat", "a bird"]
    assert len({metadata_of(path)["seed"] for path in paths}) == 1
    assert (tmp_path / "sana_00007.png").read_bytes() == b"kept"


def test_sprint_has_its_own_steps_and_takes_an_image(model_options, files, tmp_path, capsys):
    paths = files | {"transformer": files["transformer"].with_name("sprint.safetensors")}
    options = [str(paths["transformer"]) if word == str(files["transformer"]) else word for word in model_options[:-2]]
    image, output = tmp_path / "start.png", tmp_path / "end.png"
    Image.new("RGB", (96, 64), (30, 120, 200)).save(image)
    extra = ["--image", str(image), "--strength", "0.5", "--height", "64", "--seed", "3", "--output", str(output)]
    assert main(["generate", *options, "--prompt", PROMPT, *extra]) == 0
    settings = metadata_of(output)
    assert settings.pop("models")["transformer"] == "sprint.safetensors" and settings.pop("image") == "start.png"
    assert settings["num_inference_steps"] == 2 and not {"sampler", "shift", "negative_prompt"} & settings.keys()
    with Image.open(image) as start, Image.open(output) as picture:
        (again,) = SanaPipeline.from_files(**paths, device="cpu")(**settings, image=start)
        assert picture.tobytes() == again.tobytes()
    assert main(["generate", *options, "--prompt", PROMPT, "--negative-prompt", "blurry", *extra]) == 1
    assert "negative_prompt given, which Sana-Sprint has no use for" in capsys.readouterr().err


def test_an_image_is_drawn_anew_under_the_mask(model_options, files, tmp_path, capsys):
    image, mask, output = (tmp_path / name for name in ("start.png", "mask.png", "end.png"))
    Image.effect_noise((96, 96), 90).convert("RGB").save(image)
    white_on_the_left = Image.new("L", (96, 96))
    white_on_the_left.paste(255, (0, 0, 32, 96))
    white_on_the_left.save(mask)
    command = ["generate", *model_options, "--prompt", "a cat", "--seed", "3", "--image", str(image)]
    assert main([*command, "--mask", str(mask), "--output", str(output)]) == 0
    settings = metadata_of(output)
    assert [settings.pop(name) for name in ("image", "mask")] == ["start.png", "mask.png"]
    del settings["models"]
    with Image.open(image) as start, Image.open(mask) as where, Image.open(output) as picture:
        (again,) = SanaPipeline.from_files(**files, device="cpu")(**settings, image=start, mask=where)
        assert picture.tobytes() == again.tobytes()
        assert picture.crop((32, 0, 96, 96)).tobytes() == start.crop((32, 0, 96, 96)).tobytes()


def test_sources_that_cannot_be_used_are_one_line(model_options, tmp_path, capsys):
    command = ["generate", *model_options, "--prompt", "a cat", "--output", str(tmp_path / "out.png")]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for options, message in (
        (["--image", "no.png"], "no.png"),
        (["--image", str(broken)], "cannot identify image file"),
        (["--strength", "0.5"], "strength given without an image"),
    ):
        assert main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [broken]


def test_a_diffusers_folder_is_a_model(files, tmp_path, capsys):
    save_transformer(tiny.transformer(), tmp_path / "model" / "transformer", layout="diffusers")
    for name in ("vae", "text_encoder"):
        (tmp_path / "model" / name).mkdir()
        (tmp_path / "model" / name / "model.safetensors").symlink_to(files[name])
    command = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--steps", "1", "--prompt", "a cat"]
    assert main([*command, "--output", str(tmp_path / "cat.png")]) == 0
    assert metadata_of(tmp_path / "cat.png")["models"] == {"model": "model"}


def test_nano_is_the_default(monkeypatch, tmp_path):
    loaded = []

    def from_files(**options):
        loaded.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(SanaPipeline, "from_files", from_files)
    assert main(["generate", "--prompt", "a cat", "--output", str(tmp_path)]) == 1
    assert loaded == [{**NANO_FILES, "variant": None, "device": None, "dtype": None}]
    assert {path.parent.name for path in NANO_FILES.values()} == {"diffusion_models", "vae", "text_encoders"}
    assert {path.parents[1] for path in NANO_FILES.values()} == {ROOT / "models"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--transformer", "a.safetensors"], "--vae and --text-encoder missing: name all three"),
        (
            ["--transformer", "a.st", "--vae", "b.st", "--text-encoder", "c.st"],
            "no such file or folder: transformer a.st",
        ),
        (["--model", "folder", "--vae", "b.safetensors"], "--model names a whole folder"),
        (["--model", "no/such/folder"], "no/such/folder is not a folder"),
        (["--prompt", "another", "--output", "one.png"], "2 prompts do not fit in one.png"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "a cat", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_bad_layers_say_which_there_are(model_options, tmp_path, capsys):
    options = ["--prompt", "a cat", "--output", str(tmp_path / "cat.png"), "--pag-layers"]
    assert main(["generate", *model_options, *options, "8"]) == 1
    assert "blocks [8]: expected one or more of 0 to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", *model_options, *options, "8;14"])
    assert "the layers are '8;14': expected numbers with commas" in capsys.readouterr().err


def test_bad_size_is_one_line_and_leaves_no_file(model_options, tmp_path, capsys):
    options = ["--prompt", "a cat", "--width", "50", "--output", str(tmp_path / "cat.png")]
    assert main(["generate", *model_options, *options]) == 1
    assert "error: cannot make a 50x96 picture" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, message", [("nonsense", "nonsense"), ("cuda:999", "no usable GPU")])
def test_device_that_is_not_there_is_refused(name, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "a cat", "--device", name])
    assert message in capsys.readouterr().err


@pytest.fixture
def full_disk(monkeypatch):
    """Saving a picture writes half of it, then the disk is full."""

    def save(self, path, **options):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)


def test_a_full_disk_costs_no_file(full_disk, tmp_path):
    path = tmp_path / "kept.png"
    path.write_bytes(b"the old picture")
    with pytest.raises(OSError, match=r"could not write the picture \(No space left on device\).*kept.png"):
        write_png(Image.new("RGB", (8, 8)), path, {})
    assert path.read_bytes() == b"the old picture"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_seed(full_disk, model_options, tmp_path, capsys):
    options = ["--prompt", "a cat", "--seed", "12", "--output", str(tmp_path / "cat.png")]
    assert main(["generate", *model_options, *options]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "--seed 12 draws the picture again" in error


def test_png_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    write_png(Image.new("RGB", (8, 4), "red"), path, {"prompt": 'a "🐼"'})
    with Image.open(path) as picture:
        assert picture.size == (8, 4) and picture.getpixel((0, 0)) == (255, 0, 0)
    assert metadata_of(path) == {"prompt": 'a "🐼"'}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("network, load", [("transformer", load_transformer), ("vae", load_dc_ae)])
def test_convert_and_back_is_bit_equal(network, load, files, tmp_path, capsys):
    there, back = tmp_path / "diffusers", tmp_path / "official.safetensors"
    assert main(["convert", network, str(files[network]), str(there), "--to", "diffusers"]) == 0
    assert (there / "config.json").is_file()
    assert main(["convert", network, str(there), str(back), "--to", "official"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(there), str(back)]
    original, _ = read_state_dict(files[network])
    converted, _ = read_state_dict(back)
    assert original.keys() == converted.keys()
    assert all(torch.equal(original[key], converted[key]) for key in original)
    assert load(back).config == load(files[network]).config


def test_convert_casts_when_asked(files, tmp_path, capsys):
    output = tmp_path / "narrow.safetensors"
    command = ["convert", "transformer", str(files["transformer"]), str(output), "--to", "official"]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert load_transformer(output).dtype == torch.bfloat16


def test_convert_says_what_a_wrong_file_is(files, tmp_path, capsys):
    command = ["convert", "transformer", str(files["vae"]), str(tmp_path / "x.safetensors"), "--to", "official"]
    assert main(command) == 1
    assert "DC-AE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[], ["generate"], ["train"], ["convert"]])
def test_help_names_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m sana_core" in text
    if command == ["generate"]:
        for option in (
            "--prompt",
            "--output",
            "--height",
            "--width",
            "--steps",
            "--guidance-scale",
            "--pag-scale",
            "--pag-layers",
            "--guidance-interval",
            "--seed",
            "--dtype",
        ):
            assert option in text
