"""`generate` with a prompt file: resumed, with bad entries, and shared among processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sana_core.__main__ import main
from sana_core.checkpoint import save_transformer
from sana_core.commands.generate import Drawing
from sana_core.commands.ranks import Rank, own_device, own_rank
from tests import tiny

ROOT = Path(__file__).parents[2]
LINES = ["a red cat", "红色背景左边的熊猫 🐼 --hw 64:96", "two green birds --hw 96:32", "a red cat --hw 64:64"]
NAMES = ["a_red_cat", "红色背景左边的熊猫_🐼", "two_green_birds", "a_red_cat_2"]
FOLDERS = {"transformer": "diffusion_models", "vae": "vae", "text-encoder": "text_encoders"}
LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def options(tiny_models):
    files = {part: tiny_models / folder / "tiny.safetensors" for part, folder in FOLDERS.items()}
    words = [word for part, path in files.items() for word in (f"--{part}", str(path))]
    return ["generate", *words, "--device", "cpu", "--steps", "2"]


@pytest.fixture
def write(tmp_path):
    """Writes a prompt file and gives the words that name it."""

    def write(content):
        in_lines = not isinstance(content, dict)
        path = tmp_path / ("prompts.txt" if in_lines else "prompts.json")
        path.write_text("\n".join(content) if in_lines else json.dumps(content), encoding="utf-8")
        return [f"--{path.suffix[1:]}-file", str(path)]

    return write


def pictures_of(folder):
    """Pixels of each picture by its name; nothing else may be in the folder."""
    pictures = {}
    for path in folder.iterdir():
        assert path.suffix == ".png"
        with Image.open(path) as picture:
            pictures[path.stem] = (picture.size, picture.tobytes())
    return pictures


def metadata_of(path):
    with Image.open(path) as picture:
        return json.loads(picture.text["sana"])


def times_of(folder):
    return {path.stem: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_line_is_a_picture_with_its_own_size(options, write, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    assert main([*options, *write(LINES), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(output / f"{name}.png") for name in NAMES]
    assert printed.err.splitlines()[-1] == "4 drawn, 0 already there, 0 failed"
    sizes = {name: size for name, (size, _) in pictures_of(output).items()}
    assert sizes == dict(zip(NAMES, [(96, 96), (96, 64), (32, 96), (64, 64)], strict=True))
    assert metadata_of(output / f"{NAMES[1]}.png")["prompt"] == "红色背景左边的熊猫 🐼"


def test_a_picture_is_the_one_that_its_prompt_alone_gives(options, write, tmp_path, capsys):
    assert main([*options, *write(LINES), "--seed", "5", "--output", str(tmp_path / "out")]) == 0
    alone = ["--prompt", "two green birds", "--height", "96", "--width", "32", "--seed", "5"]
    assert main([*options, *alone, "--output", str(tmp_path / "alone" / "birds.png")]) == 0
    assert pictures_of(tmp_path / "out")["two_green_birds"] == pictures_of(tmp_path / "alone")["birds"]
    assert metadata_of(tmp_path / "out" / "two_green_birds.png") == metadata_of(tmp_path / "alone" / "birds.png")


def test_aspect_ratios_take_the_official_table_of_the_model(options, write, tmp_path, capsys):
    """9:16 is nearest to 0.55 of the table for 256 px: 192 high, 352 wide."""
    transformer = tmp_path / "larger.safetensors"
    save_transformer(tiny.transformer(image_size=256), transformer)
    command = [str(transformer) if word.endswith("diffusion_models/tiny.safetensors") else word for word in options]
    command = [*command, *write(["a cat --ar 9:16", "b"]), "--height", "64", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    sizes = {name: size for name, (size, _) in pictures_of(tmp_path / "out").items()}
    assert sizes == {"a_cat": (352, 192), "b": (256, 64)}


def test_json_entries_have_settings_of_their_own(options, write, tmp_path, capsys):
    content = {"x": {"prompt": "a cat", "seed": 9, "negative_prompt": "blurry", "width": 32}, "y": "a cat"}
    output = tmp_path / "out"
    command = [*options, *write(content), "--output", str(output), "--negative-prompt", "dull", "--height", "64"]
    assert main(command) == 0
    keys = ("prompt", "seed", "negative_prompt", "width", "height")
    assert [metadata_of(output / "x.png")[key] for key in keys] == ["a cat", 9, "blurry", 32, 64]
    assert [metadata_of(output / "y.png")[key] for key in keys] == ["a cat", 0, "dull", 96, 64]


def test_an_interrupted_run_is_resumed_to_the_same_pictures(options, write, tmp_path, monkeypatch, capsys):
    source = write(LINES)
    assert main([*options, *source, "--output", str(tmp_path / "whole")]) == 0
    draw, command = Drawing.draw, [*options, *source, "--output", str(tmp_path / "resumed")]

    def interrupted(drawing, prompt, args, path):
        if prompt == "two green birds":
            raise KeyboardInterrupt
        draw(drawing, prompt, args, path)

    monkeypatch.setattr(Drawing, "draw", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped"
    times = times_of(tmp_path / "resumed")
    assert sorted(times) == sorted(NAMES[:2])
    monkeypatch.undo()
    assert main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "2 drawn, 2 already there, 0 failed"
    assert pictures_of(tmp_path / "resumed") == pictures_of(tmp_path / "whole")
    assert times_of(tmp_path / "resumed").items() >= times.items()


def test_only_what_changed_is_drawn_again(options, write, tmp_path, capsys, caplog):
    output = tmp_path / "out"
    command = [*options, "--output", str(output)]
    assert main([*command, *write(LINES)]) == 0
    times, whole = times_of(output), pictures_of(output)
    (output / f"{NAMES[0]}.png").write_bytes((output / f"{NAMES[0]}.png").read_bytes()[:-200])  # cut off
    (output / f"{NAMES[1]}.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(output / f"{NAMES[2]}.png")  # another program's
    assert main([*command, *write(LINES)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "3 drawn, 1 already there, 0 failed"
    assert caplog.text.count("is drawn again: it is no picture of this command") == 3
    assert pictures_of(output) == whole
    assert times_of(output)[NAMES[3]] == times[NAMES[3]]
    # A line put before the others leaves theirs alone, another size or setting does not.
    edited = ["first", *LINES[:3], LINES[3].replace("64:64", "32:64")]
    assert main([*command, *write(edited)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "2 drawn, 3 already there, 0 failed"
    assert main([*command, *write(edited), "--guidance-scale", "3"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "5 drawn, 0 already there, 0 failed"


def test_one_bad_line_is_reported_and_the_rest_drawn(options, write, tmp_path, capsys, caplog):
    lines = ["a cat", "bad --ar 3", "", "no table for 96 px --ar 2:3", "rounded --hw 40:64", "last"]
    assert main([*options, *write(lines), "--output", str(tmp_path / "out")]) == 1
    path = tmp_path / "prompts.txt"
    rounded, bad, no_table = caplog.messages
    assert rounded == f"{path}, line 5: the height of 40 becomes 32, the nearest multiple of 32"
    assert bad.startswith(f"{path}, line 2: '--ar 3' is not understood")
    assert no_table.startswith(f"{path}, line 4: --ar picks from the official table")
    expected = "3 drawn, 0 already there, 2 failed (line 2, line 4). The same command tries the failed ones again"
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert sorted(pictures_of(tmp_path / "out")) == ["a_cat", "last", "rounded"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), FloatingPointError("NaN or infinity from the decoder")]
)
def test_a_failing_picture_does_not_stop_the_rest(options, write, tmp_path, monkeypatch, capsys, caplog, error):
    draw_others = Drawing.draw

    def draw(drawing, prompt, args, path):
        if prompt == "b":
            raise error
        draw_others(drawing, prompt, args, path)

    monkeypatch.setattr(Drawing, "draw", draw)
    command = [*options, *write({"x": "a", "y": "b", "z": "c"}), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert caplog.messages == [f"{tmp_path / 'prompts.json'}, entry 'y': {error}"]
    assert "2 drawn, 0 already there, 1 failed (entry 'y')" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "1 drawn, 2 already there, 0 failed"


def test_a_full_disk_stops_at_once(options, write, tmp_path, monkeypatch, capsys):
    def save(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert main([*options, *write(LINES), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("No space left on device") == 1 and "the same command goes on from there" in error


@pytest.mark.parametrize(
    "words, message",
    [
        (["--txt-file", "no.txt"], "there is no prompt file no.txt"),
        (["--json-file", "a.txt"], "--json-file wants a .json file, not a.txt"),
        (["--txt-file", "a.txt", "--output", "one.png"], "the prompts of a file do not fit in one.png: name a folder"),
    ],
)
def test_options_that_do_not_fit_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a cat")
    assert main(["generate", *words]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {message}\n"


@pytest.mark.parametrize(
    "words", [[], ["--prompt", "a", "--txt-file", "b.txt"], ["--txt-file", "a", "--json-file", "b"]]
)
def test_prompts_come_from_one_place(words, capsys):
    with pytest.raises(SystemExit):
        main(["generate", *words])
    assert "--txt-file" in capsys.readouterr().err


@pytest.fixture
def one_thread():
    """So that sums have the order that they have in the processes that torchrun starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_draw_what_one_draws(options, write, tmp_path, capsys, one_thread):
    """torchrun ends all processes as soon as one fails: rank 0, which has the bad line, must wait for the other one."""
    command = [*options, *write([*LINES, "bad --ar 3", "the last one"])]
    assert main([*command, "--output", str(tmp_path / "single")]) == 1
    summary = "error: 5 drawn, 0 already there, 1 failed (line 5). The same command tries the failed ones again\n"
    assert capsys.readouterr().err.endswith(summary)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sana_core"]
    result = subprocess.run(
        [sys.executable, *torchrun, *command, "--output", str(tmp_path / "shared")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 1
    assert result.stderr.count(summary) == 1
    assert result.stderr.count("line 5: '--ar 3' is not understood") == 1
    drawn = [line for line in result.stdout.splitlines() if line.endswith(".png")]
    assert sorted(drawn) == sorted(str(tmp_path / "shared" / f"{name}.png") for name in [*NAMES, "the_last_one"])
    assert pictures_of(tmp_path / "shared") == pictures_of(tmp_path / "single")


def test_processes_started_by_hand_share_a_folder(options, write, tmp_path, monkeypatch, capsys):
    command = [*options, *write(LINES), "--output", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
        assert capsys.readouterr().err.splitlines()[-1] == "2 drawn, 0 already there, 0 failed"
    assert sorted(pictures_of(tmp_path / "out")) == sorted(NAMES)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "0 drawn, 4 already there, 0 failed"


def test_prompts_of_the_command_line_are_not_shared(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*options, "--prompt", "a cat", "--output", str(tmp_path)]) == 1
    assert "2 processes cannot share --prompt: give the prompts as --txt-file or --json-file" in capsys.readouterr().err


def test_shares_are_whole_and_apart():
    work = list(range(7))
    shares = [Rank(index, 3).share(work) for index in range(3)]
    assert sorted(sum(shares, [])) == work and max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rank, count", [("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_rank_that_cannot_be(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ValueError, match="expected 0 <= RANK < WORLD_SIZE"):
        own_rank()


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda, second = torch.device("cuda"), torch.device("cuda:1")
    assert own_device(None) is None and own_device(cuda) == cuda  # no launcher: the choice is the pipeline's
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(None) == own_device(cuda) == second and chosen == [second, second]
    for named in (torch.device("cpu"), torch.device("cuda:0")):
        assert own_device(named) == named
