"""`grid`: each picture is the one that `generate` draws with the pair's values."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from sana_core.__main__ import main
from sana_core.commands import grid
from sana_core.pictures import read_metadata
from tests import loras, tiny


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_every_pair_is_what_generate_draws(model_options, tmp_path, capsys):
    common = [*model_options, "--prompt", "a cat", "--seed", "3", "--width", "64"]
    axes = ["--x", "steps=1,2", "--y", "guidance_scale=1, 4.5,7"]
    assert main(["grid", *common, *axes, "--output", str(tmp_path)]) == 0
    cells = [f"grid_00001_{row:02d}_{column:02d}.png" for row in (1, 2, 3) for column in (1, 2)]
    names = [*cells, "grid_00001.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    pairs = [(steps, scale) for scale in (1.0, 4.5, 7.0) for steps in (1, 2)]
    notes = [read_metadata(tmp_path / name) for name in cells]
    assert [(note["num_inference_steps"], note["guidance_scale"]) for note in notes] == pairs
    alone = ["--steps", "2", "--guidance-scale", "7", "--output", str(tmp_path / "alone.png")]
    assert main(["generate", *common, *alone]) == 0
    assert np.array_equal(pixels(tmp_path / cells[-1]), pixels(tmp_path / "alone.png"))
    sheet = pixels(tmp_path / "grid_00001.png")
    height, width = pixels(tmp_path / cells[-1]).shape[:2]
    assert np.array_equal(sheet[-height - 8 : -8, -width - 8 : -8], pixels(tmp_path / cells[-1]))
    x, y = {"steps": ["1", "2"]}, {"guidance-scale": ["1", "4.5", "7"]}
    assert read_metadata(tmp_path / "grid_00001.png") == {"grid": {"x": x, "y": y}, "seed": 3}
    assert main(["grid", *common, "--steps", "1", "--x", "seed=1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "grid_00002.png").is_file() and (tmp_path / "grid_00002_01_01.png").is_file()


def test_prompts_vary_between_bars_and_one_seed_serves_all(model_options, tmp_path, capsys):
    command = ["grid", *model_options, "--steps", "1", "--prompt", "unused", "--x", "prompt=a cat, asleep|一只狗 🐶"]
    assert main([*command, "--output", str(tmp_path / "sheet.png")]) == 0
    notes = [read_metadata(tmp_path / f"sheet_01_{column:02d}.png") for column in (1, 2)]
    assert [note["prompt"] for note in notes] == ["a cat, asleep", "一只狗 🐶"]
    seeds = {note["seed"] for note in (*notes, read_metadata(tmp_path / "sheet.png"))}
    assert len(seeds) == 1


def test_loras_vary_and_each_model_is_loaded_once(model_options, tmp_path, capsys, monkeypatch):
    save_file(loras.flat(loras.factors(tiny.transformer(), ["blocks.1.attn.qkv"])), tmp_path / "style.safetensors")
    opened, load_drawing = [], grid.load_drawing
    monkeypatch.setattr(grid, "load_drawing", lambda args: opened.append(args.lora) or load_drawing(args))
    path = tmp_path / "style.safetensors"
    axes = ["--x", f"lora={path}:0,{path}:1", "--y", "steps=1,2"]
    common = ["--prompt", "a cat", "--seed", "3", "--output", str(tmp_path / "sheet.png")]
    assert main(["grid", *model_options, *axes, *common]) == 0
    assert opened == [[(path, 0.0)], [(path, 1.0)]]
    cells = [[pixels(tmp_path / f"sheet_{row:02d}_{column:02d}.png") for column in (1, 2)] for row in (1, 2)]
    assert not np.array_equal(cells[0][0], cells[0][1]) and not np.array_equal(cells[0][1], cells[1][1])
    assert main(["generate", *model_options, "--steps", "1", *common[:-1], str(tmp_path / "plain.png")]) == 0
    assert np.array_equal(cells[0][0], pixels(tmp_path / "plain.png")), "at strength 0"


@pytest.mark.parametrize(
    "axes, message",
    [
        (["--x", "stepz=1,2"], "unrecognized arguments: --stepz=1"),
        (["--x", "steps=1,two"], "argument --steps: invalid int value: 'two'"),
        (["--x", "sampler=flow_euler,ddim"], "argument --sampler: invalid choice: 'ddim'"),
        (["--x", "steps=1,,2"], "the values are '1,,2'"),
        (["--x", "steps="], "the values are ''"),
        (["--x", "steps"], "found 'steps', expected NAME=A,B,C"),
        (["--x", "output=a,b"], "--output is not what a grid can vary"),
        (["--y", "steps=1"], "the following arguments are required: --x"),
    ],
)
def test_axes_that_are_none_are_refused_before_anything_is_loaded(axes, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["grid", "--prompt", "a cat", *axes, "--output", str(tmp_path / "new")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "a dog", "--x", "steps=1"], "a grid has one --prompt"),
        (["--x", "steps=1", "--y", "steps=2"], "--x and --y both vary steps"),
    ],
)
def test_grids_of_no_sense_are_refused(options, message, tmp_path, capsys):
    assert main(["grid", "--prompt", "a cat", *options, "--output", str(tmp_path / "new")]) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []
