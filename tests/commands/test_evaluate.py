"""`evaluate`: the table and the JSON are what the scorers, torchmetrics and sana-nano's judge say."""

import json
import sys
import types

import pytest
import torch
from PIL import Image
from torch import nn

from sana_core.__main__ import main
from sana_core.commands import evaluate
from sana_core.evaluation import distance, load_scorer
from sana_core.evaluation.judge import Scores
from sana_core.evaluation.scenes import HELD_OUT, draw
from sana_core.pictures import open_picture, write_png
from tests.clip import save_clip

PROMPTS = {"a.png": "a red cat", "b.png": "a dog"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (name, prompt) in enumerate(PROMPTS.items()):
        picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1 - number, 1.5), 50).convert("RGB")
        write_png(picture, folder / name, {"prompt": prompt})
    return folder


def report_of(capsys, output, *options):
    assert main(["evaluate", *map(str, options), "--output", str(output)]) == 0, capsys.readouterr().err
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return table, json.loads(output.read_text(encoding="utf-8"))


def test_clip_score_of_a_folder(images, tmp_path, capsys):
    name = f"clip:{save_clip(tmp_path / 'clip')}"
    table, report = report_of(capsys, tmp_path / "new" / "report.json", "--images", images, "--scorer", name)
    expected = load_scorer(name)([open_picture(images / file) for file in PROMPTS], list(PROMPTS.values()))
    found = report["scores"][name]
    assert list(found["pictures"].values()) == pytest.approx(expected) and list(found["pictures"]) == list(PROMPTS)
    assert found["mean"] == pytest.approx(sum(expected) / 2) and table == {name: f"{found['mean']:.4f}"}
    assert report["count"] == 2


def test_several_scorers_of_more_pictures_than_are_held_at_once(images, tmp_path, capsys, monkeypatch):
    for number in range(evaluate.SHARE):
        write_png(Image.new("RGB", (number + 1, 8)), images / f"c{number:02d}.png", {"prompt": str(number)})
    lengths = {"length": lambda pictures, prompts: map(len, prompts), "width": lambda p, _: [x.width for x in p]}
    monkeypatch.setitem(sys.modules, "my_scorer", types.SimpleNamespace(**lengths))
    scorers = ["--scorer", "my_scorer:length", "--scorer", "my_scorer:width"]
    _, report = report_of(capsys, tmp_path / "report.json", "--images", images, *scorers)
    widths = report["scores"]["my_scorer:width"]["pictures"]
    assert list(widths.values()) == [48, 48, *range(1, evaluate.SHARE + 1)]
    assert report["scores"]["my_scorer:length"]["pictures"]["a.png"] == len("a red cat")


def test_pictures_of_one_prompt_come_together(tmp_path, capsys, monkeypatch):
    """Others lie between them, and together they are more than a share."""
    given = []
    count = evaluate.SHARE + 4
    for number in range(count):
        prompt = "other" if number == 3 else "the same"
        write_png(Image.new("RGB", (number + 1, 8)), tmp_path / f"{number:02d}.png", {"prompt": prompt})

    def scorer(pictures, prompts):
        given.append(prompts)
        return [picture.width for picture in pictures]

    monkeypatch.setitem(sys.modules, "my_scorer", types.SimpleNamespace(width=scorer))
    options = ["--images", tmp_path, "--scorer", "my_scorer:width"]
    _, report = report_of(capsys, tmp_path / "report.json", *options)
    assert given == [["the same"] * (count - 1), ["other"]]
    scores = report["scores"]["my_scorer:width"]["pictures"]
    assert scores == {f"{number:02d}.png": number + 1 for number in range(count)} and list(scores) == sorted(scores)


def test_fid_of_two_folders(images, tmp_path, capsys, monkeypatch):
    """Means of the only feature 20 and 60, deviations 10 and 20: 40^2 + 10^2."""
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Red(nn.Module):
        num_features = 1

        def forward(self, pixels):
            return pixels[:, 0].float().mean(dim=(1, 2))[:, None]

    metric = fid.FrechetInceptionDistance(feature=Red())
    monkeypatch.setattr(distance, "_metric", lambda network: metric)
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder, reds in zip(folders, [(10, 20, 30), (40, 60, 80)], strict=True):
        folder.mkdir()
        for red in reds:
            Image.new("RGB", (9, 8), (red, 1, 1)).save(folder / f"{red}.png")
    options = ["--images", folders[0], "--reference", folders[1], "--inception", tmp_path / "weights.pth"]
    table, report = report_of(capsys, tmp_path / "report.json", *options)
    assert report["fid"] == pytest.approx(1700, abs=0.01) and table == {"fid": f"{report['fid']:.4f}"}


def test_nano_scores_are_those_of_what_it_draws(monkeypatch, tmp_path, capsys):
    """A model that draws the first scene right in English, and the first scene always in the other languages."""
    asked = []

    def draw_scenes(prompts, *, height, width, seed):
        asked.append((len(prompts), height, width, seed))
        order = range(len(prompts)) if len(asked) <= 2 else [0] * len(prompts)
        return [Image.fromarray(draw(HELD_OUT[seed + index])) for index in order]

    monkeypatch.setattr(evaluate, "load_pipeline", lambda args, files: draw_scenes)
    table, report = report_of(capsys, tmp_path / "report.json", "--nano", "22")
    assert asked == [(20, 256, 256, 0), (2, 256, 256, 20)] * 3
    assert report["nano"]["en"] == {"background": 1.0, "place": 1.0, "subject": 1.0}
    assert Scores(**report["nano"]["zh"]).subject == 2 / 22
    assert table["nano en subject"] == "100.0%" and table["nano emoji subject"] == "9.1%"


@pytest.mark.slow
def test_nano_draws_what_training_never_saw(tmp_path, capsys):
    _, report = report_of(capsys, tmp_path / "report.json", "--nano", "3", "--device", "cpu")
    assert all(min(report["nano"][language].values()) >= 2 / 3 for language in ("en", "zh", "emoji"))


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to evaluate"),
        (["--images", "images", "--nano", "1"], "--images alone says not what to evaluate"),
        (["--scorer", "nano"], "name their folder with --images"),
        (["--images", "images", "--reference", "images"], "--reference and --inception belong together"),
        (["--images", "nowhere", "--scorer", "nano"], "nowhere is not a folder"),
        (["--images", "empty", "--scorer", "nano"], "empty holds no picture: expected files ending in .png"),
        (["--images", "strange", "--scorer", "nano"], "plain.png does not say how it was drawn"),
        (["--images", "sheets", "--scorer", "nano"], "sheet.png is no picture of one prompt"),
        (["--images", "broken", "--scorer", "nano"], "broken.png is no picture that can be read"),
        (["--images", "images", "--scorer", "nano"], "images/a.png: sana-nano's scorer judges pictures of 256 x 256"),
        (["--images", "images", "--scorer", "best"], "there is no scorer 'best'"),
        (["--images", "images", "--scorer", "my_scorer:few"], "1 scores for 2 pictures (images/a.png, images/b.png)"),
        (["--images", "images", "--scorer", "my_scorer:nan"], "nan for images/a.png"),
        (["--nano", "0"], "0 held-out combinations asked for: there are 1 to 500"),
        (["--nano", "501"], "501 held-out combinations"),
    ],
)
def test_bad_input_is_one_line(options, message, images, tmp_path, monkeypatch, capsys):
    for name in ("empty", "strange", "sheets", "broken"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "strange" / "plain.png")
    write_png(Image.new("RGB", (8, 8)), tmp_path / "sheets" / "sheet.png", {"grid": {}})
    (tmp_path / "broken" / "broken.png").write_bytes(b"no picture")
    scorers = types.SimpleNamespace(few=lambda *_: [1], nan=lambda *_: [float("nan")] * 2)
    monkeypatch.setitem(sys.modules, "my_scorer", scorers)
    monkeypatch.setattr(evaluate, "load_pipeline", lambda args, files: None)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evaluate._device(types.SimpleNamespace(device=None)) == torch.device("cuda")
    assert evaluate._device(types.SimpleNamespace(device=torch.device("cpu"))) == torch.device("cpu")
