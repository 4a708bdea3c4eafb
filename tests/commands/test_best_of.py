"""`generate --best-of`: the picture of the best seed, with all scores in its metadata."""

import sys
import types

import pytest
from PIL import Image

from sana_core import SanaPipeline
from sana_core.__main__ import main
from sana_core.pictures import read_metadata


@pytest.fixture
def scorer(monkeypatch):
    """The brightest picture wins; `given` holds what the scorer got."""
    given = []

    def brightness(pictures, prompts):
        given.append((pictures, prompts))
        return [sum(picture.convert("L").histogram()[128:]) for picture in pictures]

    monkeypatch.setitem(sys.modules, "my_scorer", types.SimpleNamespace(brightness=brightness, none=lambda *_: []))
    return given


def test_the_best_seed_is_written_and_draws_the_picture_again(scorer, model_options, tmp_path, capsys):
    best, again = tmp_path / "best.png", tmp_path / "again.png"
    command = ["generate", *model_options, "--steps", "1", "--prompt", "a cat"]
    options = ["--best-of", "4", "--scorer", "my_scorer:brightness", "--seed", "5"]
    assert main([*command, *options, "--output", str(best)]) == 0
    ((pictures, prompts),) = scorer
    assert prompts == ["a cat"] * 4 and len({picture.tobytes() for picture in pictures}) == 4
    notes = read_metadata(best)
    scores = {int(seed): score for seed, score in notes["best_of"]["scores"].items()}
    assert list(scores) == [5, 6, 7, 8] and notes["best_of"]["scorer"] == "my_scorer:brightness"
    assert scores[notes["seed"]] == max(scores.values()) > min(scores.values())
    assert main([*command, "--seed", str(notes["seed"]), "--output", str(again)]) == 0
    with Image.open(best) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes() == pictures[notes["seed"] - 5].tobytes()
    assert "best_of" not in read_metadata(again)


def test_a_file_of_prompts_is_resumed(scorer, model_options, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command = ["generate", *model_options, "--steps", "1", "--txt-file", str(tmp_path / "prompts.txt"), "--seed", "5"]
    command += ["--scorer", "my_scorer:brightness", "--output", str(tmp_path / "out")]
    assert main([*command, "--best-of", "3"]) == 0
    assert len(scorer) == 2
    (first, second) = sorted((tmp_path / "out").glob("*.png"))
    assert main([*command, "--best-of", "3"]) == 0
    assert len(scorer) == 2, "both are there"
    second.unlink()
    assert main([*command, "--best-of", "3"]) == 0
    assert len(scorer) == 3
    assert main([*command, "--best-of", "2"]) == 0
    assert len(scorer) == 5, "another choice is another picture"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--best-of", "2"], "--best-of and --scorer belong together"),
        (["--scorer", "nano"], "--best-of and --scorer belong together"),
        (["--best-of", "0", "--scorer", "my_scorer:brightness"], "best of 0: expected 1 or more"),
        (["--best-of", "2", "--scorer", "my_scorer:none"], "0 scores for 2 pictures"),
        (["--best-of", "2", "--scorer", "best"], "there is no scorer 'best'"),
        (["--best-of", "2", "--scorer", "clip:nowhere"], "nowhere holds no config.json"),
    ],
)
def test_what_cannot_choose_is_refused(scorer, model_options, tmp_path, capsys, options, message):
    command = ["generate", *model_options, "--steps", "1", "--prompt", "a cat", "--output", str(tmp_path / "cat.png")]
    assert main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_size_is_checked_before_anything_is_drawn(model_options, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(SanaPipeline, "__call__", lambda *_, **settings: drawn.append(settings))
    command = ["generate", *model_options, "--prompt", "a panda", "--output", str(tmp_path / "panda.png")]
    assert main([*command, "--best-of", "2", "--scorer", "nano"]) == 1
    assert "256 x 256 pixels, and one has 96 x 96" in capsys.readouterr().err and drawn == []
