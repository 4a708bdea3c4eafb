"""Every layout of a data set, and what becomes of bad files in each."""

import json
import os
import unicodedata
from collections import Counter

import pytest
from PIL import Image

from sana_core.resolution import Size
from sana_core.training.dataset import read_dataset
from sana_core.training.folders import DatasetError
from tests.training.pictures import encoded, picture, write

PICTURE = picture(256, 256)


def texts(dataset):
    return {sample.name: [caption.text for caption in sample.captions] for sample in dataset.samples}


def reasons(dataset):
    return {problem.name: problem.reason for problem in dataset.problems}


def test_pairs_in_any_case_nested_and_under_any_name(tmp_path):
    write(
        tmp_path,
        {
            "AAA.png": PICTURE,
            "AAA.txt": "a cat\r\non a mat\r\n",
            "B.JPG": PICTURE,
            "B.TXT": "\ufeffa dog",
            "a b/ü 🐼.WebP": PICTURE,
            "a b/ü 🐼.txt": "红色背景左边的熊猫",
            "deep/er/c.d.jpeg": PICTURE,
            "deep/er/c.d.txt": "dots in a name",
            ".hidden/x.png": PICTURE,
            "__MACOSX/._AAA.png": b"\0",
            "._AAA.png": b"\0",
            "notes.md": "not data",
        },
    )
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {
        "AAA.png": ["a cat\non a mat"],
        "B.JPG": ["a dog"],
        "a b/ü 🐼.WebP": ["红色背景左边的熊猫"],
        "deep/er/c.d.jpeg": ["dots in a name"],
    }
    assert dataset.problems == ()
    assert dataset.buckets() == {Size(256, 256): 4}


def test_accents_are_the_same_however_composed(tmp_path):
    write(tmp_path, {unicodedata.normalize("NFD", "é.png"): PICTURE, unicodedata.normalize("NFC", "é.txt"): "e"})
    assert list(texts(read_dataset(tmp_path, 256)).values()) == [["e"]]


def test_official_meta_data_repeats(tmp_path):
    names = ["a", "b.jpg", "a", "sub/c", "gone", "a", "\ud83d"]
    write(
        tmp_path,
        {
            "meta_data.json": json.dumps({"name": "x", "__kind__": "Sana-ImgDataset", "img_names": names}),
            "a.png": PICTURE,
            "a.txt": "first line\nsecond line",
            "b.jpg": PICTURE,
            "b.png": PICTURE,
            "b.txt": "b",
            "sub/c.webp": PICTURE,
            "sub/c.txt": "c",
            "unnamed.png": PICTURE,
            "unnamed.txt": "not in the list",
        },
    )
    dataset = read_dataset(tmp_path, 256)
    assert Counter(sample.name for sample in dataset.samples) == {"a.png": 3, "b.jpg": 1, "sub/c.webp": 1}
    assert reasons(dataset) == dict.fromkeys(
        ["gone", "\\ud83d"], "named by meta_data.json, but there is no picture of that name"
    )
    assert texts(dataset)["a.png"] == ["first line\nsecond line"]


@pytest.mark.parametrize("content", ["{", "[]", '{"img_names": "a"}', '{"img_names": [1]}', "{}"])
def test_a_damaged_meta_data_is_refused_by_name(tmp_path, content):
    write(tmp_path, {"meta_data.json": content, "a.png": PICTURE, "a.txt": "a"})
    with pytest.raises(DatasetError, match=r"meta_data\.json"):
        read_dataset(tmp_path, 256)


def test_official_json_captions_and_scores(tmp_path):
    write(
        tmp_path,
        {
            "a.png": PICTURE,
            "a.txt": "short",
            "a_InternVL2-26B.json": json.dumps({"a": {"InternVL2-26B": "a long one"}}),
            "a_VILA1-5-13B.json": json.dumps({"a": {"VILA1-5-13B": " another ", "none": None}}),
            "a_prompt_clip_score.json": json.dumps({"a": {"prompt": "26.5"}}),
            "a_InternVL2-26B_clip_score.json": json.dumps({"a": {"InternVL2-26B": 28.25}}),
            "a_b.png": PICTURE,  # its name begins like the other's files
            "a_b.json": json.dumps({"a_b": {"other": "of a_b"}}),
            "c.png": PICTURE,
            "c.json": json.dumps({"file_name": "c.png", "prompt": "unpacked from a tar", "width": 256}),
        },
    )
    dataset = read_dataset(tmp_path, 256)
    captions = {sample.name: {(c.text, c.score) for c in sample.captions} for sample in dataset.samples}
    assert captions == {
        "a.png": {("short", 26.5), ("a long one", 28.25), ("another", None)},
        "a_b.png": {("of a_b", None)},
        "c.png": {("unpacked from a tar", None)},
    }


def test_bad_json_captions_are_noted(tmp_path):
    write(
        tmp_path,
        {
            "a.png": PICTURE,
            "a.txt": "a",
            "a_x.json": "{not json",
            "a_prompt_clip_score.json": json.dumps({"a": {"prompt": "high"}}),
            "a_y.json": "[1, 2]",
            "a_z.json": json.dumps({"a": {"z": 5}}),
        },
    )
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"a.png": ["a"]} and dataset.samples[0].captions[0].score is None
    assert reasons(dataset) == {
        "a_x.json": "JSON file cannot be read",
        "a_prompt_clip_score.json": "score is not a number",
    }


def test_pictures_with_low_scores_are_left_out(tmp_path):
    files = {}
    for name, scores in {"low": (20, 21.9), "high": (20, 22), "none": ()}.items():
        kinds = {f"k{index}": score for index, score in enumerate(scores)}
        files |= {f"{name}.png": PICTURE, f"{name}.txt": name}
        files |= {f"{name}_k.json": json.dumps({name: dict.fromkeys(kinds, "text")})}
        files |= {f"{name}_k_clip_score.json": json.dumps({name: kinds})}
    dataset = read_dataset(write(tmp_path, files), 256, min_score=22)
    assert set(texts(dataset)) == {"high.png", "none.png"}
    assert reasons(dataset) == {"low.png": "all captions score too low"}


def test_metadata_jsonl(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"file_name": "a.png", "text": "a cat"}).encode(),
        json.dumps({"file_name": "sub/ü.jpg", "text": ["一", " two ", ""]}, ensure_ascii=False).encode(),
        b"",
        b'{"file_name": "a.png", "te',
        json.dumps({"file_name": "gone.png", "text": "x"}).encode(),
        json.dumps({"file_name": "../secret.png", "text": "x"}).encode(),
        json.dumps({"text": "no file"}).encode(),
        json.dumps(["list"]).encode(),
        json.dumps({"file_name": "a.png", "text": 5}).encode(),
        '{"file_name": "a.png", "text": "über"}'.encode("latin-1"),
        json.dumps({"file_name": "silent.png"}).encode(),
        json.dumps({"file_name": "long" * 100, "text": "x"}).encode(),
    ]
    write(
        tmp_path / "data",
        {"metadata.jsonl": b"\r\n".join(lines), "a.png": PICTURE, "sub/ü.jpg": PICTURE, "silent.png": PICTURE},
    )
    write(tmp_path, {"secret.png": PICTURE})
    dataset = read_dataset(tmp_path / "data", 256)
    assert texts(dataset) == {"a.png": ["a cat"], "sub/ü.jpg": ["一", "two"]}
    unreadable = {f"metadata.jsonl line {number}": "line cannot be read" for number in (4, 6, 7, 8, 9, 10, 12)}
    assert reasons(dataset) == unreadable | {
        "gone.png": "named by metadata.jsonl, but there is no such file",
        "silent.png": "no caption",
    }


@pytest.fixture
def with_gaps(tmp_path):
    files = {"good.png": PICTURE, "good.txt": "good", "none_here.png": PICTURE, "empty.png": PICTURE}
    return write(tmp_path, files | {"empty.txt": "\ufeff \r\n"})


@pytest.mark.parametrize(
    "policy, captions",
    [
        ("skip", {}),
        ("empty", {"none_here.png": [""], "empty.png": [""]}),
        ("filename", {"none_here.png": ["none here"], "empty.png": ["empty"]}),
        ("text:a photo of sks", {"none_here.png": ["a photo of sks"], "empty.png": ["a photo of sks"]}),
    ],
)
def test_missing_captions(with_gaps, policy, captions):
    dataset = read_dataset(with_gaps, 256, missing_captions=policy)
    assert texts(dataset) == {"good.png": ["good"]} | captions
    assert set(reasons(dataset)) == {"none_here.png", "empty.png"}
    assert all(problem.left_out == (policy == "skip") for problem in dataset.problems)


def test_missing_captions_as_an_error(with_gaps):
    with pytest.raises(DatasetError, match=r"empty\.png has no caption"):
        read_dataset(with_gaps, 256, missing_captions="error")
    with pytest.raises(ValueError, match='"skp" is none of skip, error'):
        read_dataset(with_gaps, 256, missing_captions="skp")


def test_bad_pictures_and_captions_are_left_out_by_name(tmp_path):
    half = encoded(PICTURE)[:-200]
    write(
        tmp_path,
        {
            "good.png": PICTURE,
            "half.png": half,
            "page.jpg": "<html>",
            "nothing.webp": b"",
            "latin.png": PICTURE,
            "latin.txt": "é".encode("latin-1"),
            "lonely.txt": "nobody",
            "tiny.png": picture(60, 300),
            "small.png": picture(128, 128, seed=3),
            "small_copy.png": picture(128, 128, seed=3),
            "wide.png": picture(1600, 160),
            **{f"{name}.txt": name for name in ("good", "half", "page", "nothing", "tiny", "small", "wide")},
            "small_copy.txt": "x",
        },
    )
    dataset = read_dataset(tmp_path, 256, decode=True)
    assert set(texts(dataset)) == {"good.png", "small.png", "small_copy.png", "wide.png"}
    found = {(problem.name, problem.reason, problem.left_out) for problem in dataset.problems}
    assert found == {
        ("half.png", "picture cannot be read", True),
        ("page.jpg", "picture cannot be read", True),
        ("nothing.webp", "picture cannot be read", True),
        ("latin.txt", "caption cannot be read", True),
        ("lonely.txt", "caption without a picture", True),
        ("tiny.png", "too small", True),
        ("small.png", "enlarged", False),
        ("small_copy.png", "enlarged", False),
        ("small_copy.png", "same content as another", False),
        ("wide.png", "much is cut off", False),
    }
    assert {path.name for path in tmp_path.iterdir()} >= {"half.png", "page.jpg"}  # nothing is ever deleted


def test_half_of_the_bucket_is_enough(tmp_path):
    write(tmp_path, {"a.png": picture(128, 128), "a.txt": "a", "b.png": picture(127, 127), "b.txt": "b"})
    assert set(texts(read_dataset(tmp_path, 256))) == {"a.png"}


def test_without_decoding_a_truncated_picture_is_found_by_the_cache_only(tmp_path):
    content = encoded(PICTURE, "JPEG")
    write(tmp_path, {"half.jpg": content[: len(content) // 2], "half.txt": "half"})
    assert len(read_dataset(tmp_path, 256).samples) == 1
    with pytest.raises(DatasetError, match="1 x picture cannot be read"):
        read_dataset(tmp_path, 256, decode=True)


def test_the_bucket_is_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, {"a.jpg": encoded(picture(512, 256), "JPEG", exif=exif), "a.txt": "a"})
    for decode in (False, True):
        (sample,) = read_dataset(tmp_path, 256, decode=decode).samples
        assert sample.size == Size(512, 256) and sample.bucket == Size(352, 192)


def test_animations_are_noted(tmp_path):
    frames = [picture(256, 256, seed) for seed in range(2)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    write(tmp_path, {"a.webp": content, "a.txt": "a"})
    assert reasons(read_dataset(tmp_path, 256, decode=True)) == {"a.webp": "animated: only its first frame is used"}


def test_shared_captions_and_names_that_differ_in_case(tmp_path):
    write(
        tmp_path,
        {
            "a.png": PICTURE,
            "a.jpg": PICTURE,
            "a.txt": "both",
            "B.png": PICTURE,
            "B.txt": "one",
            "b.png": PICTURE,
            "b.txt": "two",
        },
    )
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"a.jpg": ["both"], "a.png": ["both"], "B.png": ["one"], "b.png": ["two"]}
    assert reasons(dataset) == {"a.png": "shares its caption file", "b.png": "differs only in case from another"}


def test_the_same_stem_in_two_folders_is_two_samples(tmp_path):
    write(tmp_path, {"x/a.png": PICTURE, "x/a.txt": "of x", "y/a.png": PICTURE, "y/a.txt": "of y"})
    assert texts(read_dataset(tmp_path, 256)) == {"x/a.png": ["of x"], "y/a.png": ["of y"]}


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(DatasetError) as error:
        read_dataset(tmp_path, 256)
    for part in (str(tmp_path), ".png, .jpg, .jpeg, .webp", ".tar", "no such file"):
        assert part in str(error.value)


def test_a_folder_without_anything_usable_says_why(tmp_path):
    write(tmp_path, {"a.png": PICTURE, "b.png": PICTURE, "c.png": b"x", "c.txt": "c"})
    with pytest.raises(DatasetError, match="2 x no caption, 1 x picture cannot be read.*The first is a.png"):
        read_dataset(tmp_path, 256)


@pytest.mark.parametrize("name, said", [("gone", "gone does not exist"), ("file.png", "file.png is no folder")])
def test_what_is_no_folder_is_refused(tmp_path, name, said):
    write(tmp_path, {"file.png": PICTURE})
    with pytest.raises(DatasetError, match=said):
        read_dataset(tmp_path / name, 256)


def test_the_order_does_not_depend_on_the_disk(tmp_path):
    names = [f"{number}.png" for number in (3, 1, 2)]
    for name in names:
        write(tmp_path / "one", {name: PICTURE, name.replace("png", "txt"): "x"})
    for name in reversed(names):
        write(tmp_path / "two", {name: PICTURE, name.replace("png", "txt"): "x"})
    orders = [[sample.name for sample in read_dataset(tmp_path / folder, 256).samples] for folder in ("one", "two")]
    assert orders == [["1.png", "2.png", "3.png"]] * 2


def test_a_name_that_is_not_utf_8_can_be_printed(tmp_path):
    write(tmp_path, {"a.png": PICTURE, os.fsdecode(b"b\xff.png"): PICTURE, os.fsdecode(b"b\xff.txt"): "b"})
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"b\\udcff.png": ["b"]}
    dataset.samples[0].name.encode()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": PICTURE, "a.txt": "a", "locked/b.png": PICTURE, "locked/b.txt": "b"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"a.png": ["a"]}
    assert list(map(str, dataset.problems)) == ["locked: folder cannot be read (Permission denied)"]
