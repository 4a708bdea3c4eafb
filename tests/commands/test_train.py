"""`python -m sana_core train`, as a user runs it, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sana_core import SanaPipeline
from sana_core.__main__ import main
from sana_core.checkpoint import load_transformer
from sana_core.pictures import read_metadata
from sana_core.training.cache import Cache, caption_key
from sana_core.training.lock import run_lock
from sana_core.training.state import newest_state
from tests.conftest import ROOT
from tests.training.pictures import picture, write

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red cat"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def files(tiny_models):
    folders = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}
    return {part: tiny_models / folder / "tiny.safetensors" for part, folder in folders.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    content = {f"{number}.png": picture(256, 256, number) for number in range(4)}
    content |= {f"{number}.txt": f"a red cat {number}" for number in range(4)}
    return write(tmp_path_factory.mktemp("data"), content)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(files, data, cache):
    """The arguments of a run, its usual options replaced by those given; None leaves one out."""

    def arguments(**options):
        model = {} if "model" in options else files
        usual = {"data": data, "resolution": 256, "cache": cache, "steps": 4, "batch": 2, "learning_rate": 0.01}
        chosen = {**usual, **model, "device": "cpu", **options}
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in chosen.items() if value is not None)
        return ["train", *(str(part) for pair in pairs for part in pair if part is not True)]

    return arguments


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run):
    return [entry["loss"] for entry in log_of(run) if "loss" in entry]


def result_of(capsys):
    return capsys.readouterr().out.strip()


def test_a_lora(command, files, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(output=run, sample_prompt=PROMPT, sample_every=3, validation_share=0.25)) == 0
    assert result_of(capsys) == str(run / "lora.safetensors")
    assert len(losses(run)) == 4
    assert "validation_loss_0.5" in log_of(run)[-1]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_00000003_1.png", "step_00000004_1.png"]

    sample = run / "samples" / "step_00000004_1.png"
    assert read_metadata(sample) == {"prompt": PROMPT, "seed": 0, "step": 4}
    pipe = SanaPipeline.from_files(**files, device="cpu")
    pipe.load_lora(run / "lora.safetensors")
    (drawn,) = pipe(PROMPT, seed=0, height=256, width=256)
    assert np.abs(np.asarray(drawn, int) - np.asarray(Image.open(sample), int)).max() <= 2


def test_the_lora_loads_in_diffusers(command, files, tmp_path):
    from diffusers import SanaPipeline as Diffusers
    from diffusers import SanaTransformer2DModel

    assert main(command(output=tmp_path / "run", targets="attention+feed-forward", rank=4)) == 0
    assert (
        main(["convert", "transformer", str(files["transformer"]), str(tmp_path / "other"), "--to", "diffusers"]) == 0
    )
    other = SanaTransformer2DModel.from_pretrained(tmp_path / "other").eval()
    pipe = Diffusers(tokenizer=None, text_encoder=None, vae=None, transformer=other, scheduler=None)
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name="lora.safetensors")
    ours = SanaPipeline.from_files(**files, device="cpu")
    ours.load_lora(tmp_path / "run" / "lora.safetensors")
    embeds, mask = ours.text_encoder.encode(PROMPT)
    x, timestep = torch.randn(1, 32, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        expected = ours.transformer(x, timestep, embeds, mask)
        found = other(x, embeds, timestep, encoder_attention_mask=mask).sample
    assert (found - expected).abs().max() < 1e-4


def test_all_weights_and_the_same_command_goes_on(command, files, tmp_path, capsys):
    options = {"mode": "full", "ema": 0.9, "accumulation": 2, "save_every": 1}
    assert main(command(output=tmp_path / "unbroken", **options)) == 0
    assert main(command(output=tmp_path / "broken", **options, steps=2)) == 0
    assert main(command(output=tmp_path / "broken", **options)) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    result = tmp_path / "broken" / "transformer.safetensors"
    expected = load_file(tmp_path / "unbroken" / "transformer.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(result).items())
    assert result_of(capsys).splitlines()[-1] == str(result)
    trained, plain = load_transformer(result), load_transformer(files["transformer"])
    assert trained.config == plain.config
    assert trained.dtype == torch.bfloat16  # what a model of its configuration is published in
    assert max((a - b).abs().max() for a, b in zip(trained.parameters(), plain.parameters(), strict=True)) > 1e-3
    assert SanaPipeline.from_files(**files | {"transformer": result}, device="cpu")(PROMPT, num_inference_steps=1)


def test_two_processes_train_as_one(command, tmp_path):
    assert main(command(output=tmp_path / "alone")) == 0
    done = torchrun(command(output=tmp_path / "two", batch=1, cache=tmp_path / "new cache", sample_prompt=PROMPT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two" / "lora.safetensors")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def torchrun(arguments):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sana_core"]
    return subprocess.run(
        [*program, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_a_model_shared_out_trains_as_one_and_goes_on_in_one(command, tmp_path):
    """Within rounding, at a small rate, since Adam divides noise by noise where a gradient is zero."""
    options = {"mode": "full", "learning_rate": 1e-4, "ema": 0.5}
    whole, shared = tmp_path / "alone", tmp_path / "shared out"
    assert main(command(output=whole, **options)) == 0
    for steps in (2, 4):
        done = torchrun([*command(output=shared, **options, batch=1, steps=steps), "--shard"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(shared / "transformer.safetensors")
    assert losses(shared) == pytest.approx(losses(whole), abs=1e-5)
    found, expected = (load_file(run / "transformer.safetensors") for run in (shared, whole))
    assert found.keys() == expected.keys()
    assert max((found[name].float() - expected[name].float()).abs().max() for name in found) < 2e-3
    assert main(command(output=shared, **options, batch=1, steps=5)) == 0
    assert losses(shared)[:4] == pytest.approx(losses(whole), abs=1e-5) and len(losses(shared)) == 5


def test_control_c_saves(command, tmp_path):
    run = tmp_path / "run"
    program = [sys.executable, "-u", "-m", "sana_core", *command(output=run, steps=100_000)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(program, env=ENVIRONMENT, cwd=ROOT, stderr=said)
    while process.poll() is None and not ((run / "log.jsonl").exists() and losses_so_far(run)):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    said = (tmp_path / "said").read_text()
    _, progress = newest_state(run)
    assert progress["step"] == len(losses(run)) > 0
    assert f"Step {progress['step']} is saved in {run}: the same command goes on from there." in said
    assert (run / "lora.safetensors").is_file()


def losses_so_far(run):
    return (run / "log.jsonl").read_text().count("\n")


def test_a_preset_sets_what_is_left_open(command, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sana_core.commands.train.fine_tune", lambda *args, **_: seen.append(args[4]) or tmp_path)
    assert main(command(output=tmp_path / "run", preset="32gb", batch=None)) == 0
    assert main(command(output=tmp_path / "run", preset="32gb", batch=3, precision="fp32") + ["--no-recompute"]) == 0
    found = [(one.batch_size, one.config.precision, one.recompute) for one in seen]
    assert found == [(8, "bf16", True), (3, "fp32", False)]


def test_which_captions_are_drawn_is_part_of_the_run(command, files, tmp_path, capsys, monkeypatch):
    write(tmp_path / "data", {"a.png": picture(256, 256), "a_x.json": '{"a": {"good": "a cat", "bad": "a dog"}}'})
    write(tmp_path / "data", {"a_x_clip_score.json": '{"a": {"good": "30", "bad": "28"}}'})
    drawn = []
    features = Cache.features
    monkeypatch.setattr(Cache, "features", lambda self, key: drawn.append(key) or features(self, key))
    options = {"data": tmp_path / "data", "batch": 1, "steps": 8}
    run = tmp_path / "strict"
    assert main(command(output=run, **options, caption_threshold=29)) == 0
    assert set(drawn) == {caption_key("a cat")}
    drawn.clear()
    assert main(command(output=tmp_path / "even", **options, caption_temperature=9)) == 0
    assert set(drawn) == {caption_key("a cat"), caption_key("a dog")}
    assert main(command(output=run, **options)) == 1
    assert "captions: 'threshold 29, temperature 0.1' -> 'absent'" in capsys.readouterr().err


def test_what_is_left_out_is_said(command, data, tmp_path, caplog):
    files = {name: (data / name).read_bytes() for name in ("0.png", "0.txt", "1.png")}
    write(tmp_path / "data", files | {"2.heic": b"", "2.txt": "a red cat", "3.png": picture(60, 60), "3.txt": "small"})
    assert main(command(output=tmp_path / "run", data=tmp_path / "data", steps=1)) == 0
    for part in ("1 x no caption", "1 x too small", "1 x kind of picture that is not read", "--check lists all"):
        assert part in caplog.text
    caplog.clear()
    assert main(command(output=tmp_path / "other", steps=1)) == 0
    assert not caplog.records


def test_a_finished_run_says_so(command, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    assert main(command(output=run, steps=3)) == 0
    before = (run / "lora.safetensors").read_bytes()
    for steps in (3, 2):
        caplog.clear()
        assert main(command(output=run, steps=steps)) == 0
        assert f"has 3 steps already, {steps} were asked for: nothing is left to train" in caplog.text
    assert (run / "lora.safetensors").read_bytes() == before and len(losses(run)) == 3


def test_an_edited_data_set_is_another_run(command, data, tmp_path, capsys):
    names = ("0.png", "0.txt")
    write(tmp_path / "data", {name: (data / name).read_bytes() for name in names})
    assert main(command(output=tmp_path / "run", data=tmp_path / "data", steps=1)) == 0
    write(tmp_path / "data", {"0.txt": "a blue cat"})
    assert main(command(output=tmp_path / "run", data=tmp_path / "data", steps=1)) == 1
    assert "data set: its content is not what the run was begun with" in capsys.readouterr().err


def test_prompts_alone_are_drawn_at_each_save(command, tmp_path):
    assert main(command(output=tmp_path / "run", steps=2, save_every=1, sample_prompt=PROMPT)) == 0
    drawn = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert drawn == ["step_00000001_1.png", "step_00000002_1.png"]
    assert main(command(output=tmp_path / "none", steps=1, sample_every=0, sample_prompt=PROMPT)) == 0
    assert not (tmp_path / "none" / "samples").exists()


@pytest.mark.parametrize("unwritable", ["output", "cache"])
def test_a_folder_that_cannot_be_written_to_is_found_out_first(
    command, data, tmp_path, capsys, monkeypatch, unwritable
):
    monkeypatch.setattr(Cache, "fill", lambda *_: pytest.fail("the data set is encoded"))
    assert main(command(**{"output": tmp_path / "run", unwritable: data / "0.png" / "inside"})) == 1
    error = capsys.readouterr().err
    assert "inside" in error and "Not a directory" in error and error.count("\n") == 1


def test_a_folder_in_use_is_found_out_first(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Cache, "fill", lambda *_: pytest.fail("the data set is encoded"))
    with run_lock(tmp_path / "run"):
        assert main(command(output=tmp_path / "run")) == 1
    assert "is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        ({"caption_temperature": -1}, "caption temperature is -1.0, expected 0 or more"),
        ({"output": None, "steps": None}, "--output and --steps missing"),
        ({"sample_every": 2}, "--sample-every given without a --sample-prompt"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"rank": 0}, "rank is 0"),
        ({"validation_share": 1.0}, "validation share is 1.0"),
        ({"batch": -1}, "batch -1"),
        ({"shard": True}, "--shard shares out all weights: it goes with --mode full"),
        ({"shard": True, "mode": "full"}, "start them with torchrun"),
        ({"vae": None}, "--vae missing"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"data": "pyproject.toml"}, "pyproject.toml is no folder and no .tar"),
        ({"optimizer": "came"}, "pip install came-pytorch"),
        ({"model": "no/such-model"}, "no/such-model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(command, tmp_path, capsys, options, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "came_pytorch", None)
    assert main(command(**{"output": tmp_path / "run", **options})) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_sprint_is_not_trained(command, tiny_models, tmp_path, capsys):
    sprint = tiny_models / "diffusion_models" / "sprint.safetensors"
    assert main(command(output=tmp_path / "run", transformer=sprint)) == 1
    assert "Sana-Sprint model, which is made by distillation" in capsys.readouterr().err


def test_another_models_text_encoder_is_refused(command, tmp_path, capsys):
    nano = ROOT / "models" / "diffusion_models" / "sana_nano.safetensors"
    assert main(command(output=tmp_path / "run", transformer=nano)) == 1
    assert "features of width 32, this model reads 192" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_continued(command, tmp_path, capsys):
    assert main(command(output=tmp_path / "run", rank=4)) == 0
    assert main(command(output=tmp_path / "run", rank=8, batch=1)) == 1
    error = capsys.readouterr().err
    assert "batch: 2 -> 1" in error and "rank: 4 -> 8" in error


def test_a_run_that_diverges_is_an_error(command, tmp_path, capsys):
    assert main(command(output=tmp_path / "run", mode="full", learning_rate=1e30, steps=9)) == 1
    assert "3 steps in a row were not finite" in capsys.readouterr().err


def test_too_few_pictures_for_validation(command, data, tmp_path, capsys):
    for name in ("0.png", "0.txt"):
        write(tmp_path / "one", {name: (data / name).read_bytes()})
    assert main(command(output=tmp_path / "run", data=tmp_path / "one", validation_share=0.5)) == 1
    assert "1 picture(s) are too few" in capsys.readouterr().err
