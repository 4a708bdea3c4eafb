"""Data sets of WebDataset tars, whole and damaged."""

import json

import pytest

from sana_core.training.dataset import read_dataset
from tests.training.pictures import encoded, picture, write, write_tar

PICTURE = picture(256, 256)


def texts(dataset):
    return {sample.name: [caption.text for caption in sample.captions] for sample in dataset.samples}


def reasons(dataset):
    return {problem.name: problem.reason for problem in dataset.problems}


def in_tar(image=PICTURE):
    return encoded(image, "JPEG")


def test_webdataset_tars(tmp_path):
    def sample(prompt, **more):
        return json.dumps({"file_name": "x", "prompt": prompt, "width": 256, "height": 256, **more})

    write_tar(
        tmp_path / "00000.tar",
        {
            "0001.jpg": in_tar(),
            "0001.json": sample("one", alt="scored elsewhere"),
            "0002.PNG": encoded(PICTURE),
            "0002.txt": "two\r\n",
            "sub/0003.webp": encoded(PICTURE, "WEBP"),
            "sub/0003.json": sample("three"),
            "0004.npy": b"latents",
            "0004.json": sample("latents only"),
            "0005.jpg": in_tar(),
            "0005.json": "{broken",
            "0006.jpg": in_tar(),
            "0006.txt": "é".encode("latin-1"),
        },
    )
    write_tar(tmp_path / "nested" / "00001.tar", {"0001.jpg": in_tar(), "0001.json": sample("the other shard's one")})
    write(
        tmp_path,
        {
            "00000_InternVL2-26B.json": json.dumps({"0001": {"prompt": "from beside the shard"}}),
            "00000_alt_clip_score.json": json.dumps({"0001": {"alt": 30, "prompt": 27}}),
            "wids-meta.json": json.dumps({"shardlist": [{"url": "00000.tar"}, {"url": "far/00009.tar"}]}),
        },
    )
    dataset = read_dataset(tmp_path, 256, decode=True)
    assert texts(dataset) == {
        "00000.tar/0001.jpg": ["one", "from beside the shard", "scored elsewhere"],
        "00000.tar/0002.png": ["two"],
        "00000.tar/sub/0003.webp": ["three"],
        "nested/00001.tar/0001.jpg": ["the other shard's one"],
    }
    assert [caption.score for caption in dataset.samples[0].captions] == [27, None, 30]
    left_out = {problem.name: problem.reason for problem in dataset.problems if problem.left_out}
    assert left_out == {
        "00000.tar/0004": "latents without a picture",
        "00000.tar/0005.jpg": "no caption",
        "00000.tar/0006.txt": "caption cannot be read",
        "00009.tar": "shard named by wids-meta.json is missing",
    }
    one = {sample.name: sample for sample in dataset.samples}["00000.tar/0001.jpg"]
    assert one.content.read() == in_tar()


def test_one_tar_alone(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": in_tar(), "a.txt": "a"})
    write_tar(tmp_path / "y.tar", {"b.jpg": in_tar(), "b.txt": "b"})
    assert texts(read_dataset(path, 256)) == {"x.tar/a.jpg": ["a"]}


def test_what_webdataset_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(3):
            prompt = {"prompt": f"caption {number}"}
            writer.write({"__key__": f"d/{number:04d}", "jpg": in_tar(picture(256, 256, number)), "json": prompt})
    assert texts(read_dataset(tmp_path, 256)) == {f"0.tar/d/{n:04d}.jpg": [f"caption {n}"] for n in range(3)}


@pytest.mark.parametrize("keep", [0.3, 0.4, 0.5, 0.6])  # in the data of a picture, or in a header
def test_of_a_truncated_tar_the_whole_samples_are_used(tmp_path, keep):
    members = {}
    for number in range(10):
        members |= {f"{number}.txt": str(number), f"{number}.jpg": in_tar(picture(256, 256, number))}
    path = write_tar(tmp_path / "cut.tar", members)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    dataset = read_dataset(tmp_path, 256, decode=True)
    assert 0 < len(dataset.samples) < 10
    assert "tar is damaged, cut short or compressed" in reasons(dataset)["cut.tar"]


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_named(tmp_path, content):
    write(tmp_path, {"bad.tar": content, "a.png": PICTURE, "a.txt": "a"})
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"a.png": ["a"]}
    assert "tar is damaged, cut short or compressed" in reasons(dataset)["bad.tar"]


def test_of_two_files_of_one_name_the_first_is_used(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.jpg": in_tar(), "a.txt": "first", "a.TXT": "second"})
    dataset = read_dataset(tmp_path, 256)
    assert texts(dataset) == {"x.tar/a.jpg": ["first"]}
    assert reasons(dataset) == {"x.tar/a.TXT": "second of its name in the tar is not used"}
