"""`python -m sana_core train --check`, as a user runs it."""

import json

import pytest

from sana_core.__main__ import main
from sana_core.checkpoint import load_tokenizer, save_text_encoder
from sana_core.commands.models import NANO_FILES
from sana_core.text import CHI
from tests import tiny
from tests.training.pictures import encoded, picture, write

PICTURE = picture(256, 256)


@pytest.fixture
def data(tmp_path):
    files = {"half.jpg": encoded(PICTURE, "JPEG")[:500], "half.txt": "half", "silent.png": PICTURE}
    for number in range(12):
        files |= {f"small{number:02d}.png": picture(60, 60), f"small{number:02d}.txt": "x"}
    captions = {"a": "a red cat", "b": "红色背景左边的熊猫", "long": "a red cat " * 200}
    for seed, (name, caption) in enumerate(captions.items()):
        files |= {f"sub/{name}.png": picture(256, 256, seed), f"sub/{name}.txt": caption}
    files |= {"wide.webp": picture(400, 200), "wide.txt": "a red cat", "copy.webp": picture(400, 200)}
    return write(tmp_path / "data 数据", files | {"copy.txt": "a copy"})


def check(*options):
    return main(["train", "--check", "--resolution", "256", *map(str, options)])


def test_the_report(data, capsys):
    before = sorted(data.rglob("*"))
    assert check("--data", data) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data}: 5 pictures, in buckets of 256 px:"
    assert [line.split() for line in lines[2:4]] == [["352x192", "0.55", "2"], ["256x256", "1.00", "3"]]
    text = "\n".join(lines)
    for part in (
        "4 different captions of ",
        "Used, but note: 1 x caption too long, its end is not read\n  sub/long.png: ",
        "  sub/long.png: ",
        'tokens, cut after "...',
        "Left out: 12 x too small\n  small00.png: 60x60, less than half of 256x256",
        "  ... and 2 more",
        "Left out: 1 x no caption\n  silent.png",
        "Left out: 1 x picture cannot be read\n  half.jpg: it is damaged",
        "Used, but note: 1 x same content as another\n  wide.webp: copy.webp",
    ):
        assert part in text
    assert sorted(data.rglob("*")) == before, "nothing is written"


def test_tokens_are_counted_as_the_encoder_counts_them(data, tmp_path, capsys):
    encoder = tiny.text_encoder()
    save_text_encoder(encoder, tmp_path / "gemma.safetensors")
    assert check("--data", data, "--text-encoder", tmp_path / "gemma.safetensors") == 0
    captions = ("a red cat", "红色背景左边的熊猫", "a red cat " * 200, "a copy")
    counts = sorted(row.prompt_tokens for row in encoder.tokenize(captions))
    assert f"4 different captions of {counts[0]} to {counts[-1]} tokens, half of them up to {counts[1]};" in (
        capsys.readouterr().out
    )


def test_a_caption_of_299_tokens_is_not_too_long(tmp_path, capsys):
    tokenizer = load_tokenizer(NANO_FILES["text_encoder"])
    instruction = len(tokenizer.encode(CHI))
    word = "red "
    caption = word
    while len(tokenizer.encode(CHI + (caption + word).strip())) <= instruction + 298:
        caption += word
    for text, cut in ((caption, False), (caption + word * 2, True)):
        write(tmp_path, {"a.png": PICTURE, "a.txt": text})
        assert check("--data", tmp_path) == 0
        assert ("too long" in capsys.readouterr().out) is cut


def test_repetitions_are_counted(tmp_path, capsys):
    meta = json.dumps({"img_names": ["a", "a", "a", "b"]})
    write(tmp_path, {"meta_data.json": meta, "a.png": PICTURE, "a.txt": "a", "b.png": PICTURE, "b.txt": "b"})
    assert check("--data", tmp_path) == 0
    assert "2 pictures, 4 with repetitions" in capsys.readouterr().out


def test_captions_for_those_without(data, capsys):
    assert check("--data", data, "--missing-captions", "text:a photo of it") == 0
    assert "Used, but note: 1 x no caption, one was made up\n  silent.png: a photo of it" in capsys.readouterr().out
    assert check("--data", data, "--missing-captions", "error") == 1
    assert "silent.png has no caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, said",
    [
        ({}, "holds no picture to train on"),
        ({"a.png": PICTURE, "b.png": PICTURE}, "2 x no caption"),
        ({"a.png": b"", "a.txt": "a"}, "1 x picture cannot be read. The first is a.png"),
        ({"a.HEIC": b"", "a.txt": "a"}, "1 x kind of picture that is not read. The first is a.HEIC"),
        ({"a.png": picture(20, 20), "a.txt": "a"}, "1 x too small"),
        ({"meta_data.json": "{"}, "meta_data.json is not valid JSON"),
    ],
)
def test_nothing_usable_is_status_1_and_one_line(tmp_path, capsys, files, said):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", files)
    assert check("--data", tmp_path / "data") == 1
    output = capsys.readouterr()
    assert said in output.err and "Traceback" not in output.err and output.out == ""


def test_a_folder_that_does_not_exist(tmp_path, capsys):
    assert check("--data", tmp_path / "gone") == 1
    assert "gone does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--resolution", "300"], ["--data"], []])
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--check", *options])
    assert exit_.value.code == 2
