import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_core.checkpoint import CheckpointError, read_state_dict
from sana_core.checkpoint.files import atomic_path, locate_weights, read_json, write_safetensors

ROOT = Path(__file__).parents[2]
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor([1, 2], dtype=torch.uint8)}


def assert_same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)


class Bomb:
    """Unpickling this runs a command: it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_safetensors_with_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"sana_config": "{}"})
    state_dict, metadata = read_state_dict(tmp_path / "x.safetensors")
    assert_same(state_dict)
    assert metadata == {"sana_config": "{}"}


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_are_unwrapped(tmp_path, wrap, zipped):
    content = {wrap: TENSORS, "epoch": 3, "optimizer": {"state": {}}} if wrap else {**TENSORS, "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(tmp_path / "x.pth")[0])


def test_header_may_begin_with_the_byte_of_a_pickle(tmp_path):
    padding = next(size for size in range(300) if save_with_metadata(tmp_path / "x.safetensors", size)[0] == 0x80)
    assert padding < 300
    assert_same(read_state_dict(tmp_path / "x.safetensors")[0])


def save_with_metadata(path, size):
    save_file(TENSORS, path, metadata={"padding": " " * size})
    return path.read_bytes()


def test_format_is_told_by_content_not_by_suffix(tmp_path):
    torch.save(TENSORS, tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.pth")
    assert_same(read_state_dict(tmp_path / "x.safetensors")[0])
    assert_same(read_state_dict(tmp_path / "y.pth")[0])


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_tensors_are_mapped_not_read(tmp_path, save):
    """256 MiB of weights must cost no memory before they are used."""
    path = tmp_path / "big"
    save({str(part): torch.zeros(1 << 24) for part in range(4)}, path)
    script = (
        "import resource, sys; from sana_core.checkpoint import read_state_dict\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "state_dict, _ = read_state_dict(sys.argv[1])\n"
        "assert sum(tensor.numel() for tensor in state_dict.values()) == 1 << 26\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(result.stdout) < 64


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": TENSORS, "payload": Bomb(tmp_path / "ran")}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"payload": Bomb(tmp_path / "ran")}, protocol=2))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(CheckpointError, match=f"{name} holds pickled Python objects.*not loaded.*safetensors"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_truncated_files_are_refused(tmp_path, save, part):
    path = tmp_path / "x.weights"
    save(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match="x.weights.*[Dd]ownload"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 32, "GGUF"),
        (b'{"weight_map": {}}', "JSON"),
        (b"some text that is no model", "neither safetensors nor torch"),
    ],
)
def test_other_files_are_named(tmp_path, content, problem):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x.safetensors holds no weights: .*{problem}"):
        read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(2), {1: torch.zeros(2)}])
def test_torch_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth holds a .* without tensors"):
        read_state_dict(tmp_path / "x.pth")


def test_missing_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.safetensors does not exist"):
        read_state_dict(tmp_path / "nothing.safetensors")


def write_shards(folder, stem="diffusion_pytorch_model", tag="", index=True):
    """Two shards, named as diffusers and transformers name them."""
    names = [f"{stem}{tag}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a": TENSORS["a"]}, folder / names[0])
    save_file({"b.c": TENSORS["b.c"]}, folder / names[1])
    if index:
        weight_map = {"a": names[0], "b.c": names[1]}
        (folder / f"{stem}.safetensors.index{tag}.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("tag", ["", ".bf16", ".fp16"])
@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, stem, tag, index):
    write_shards(tmp_path, stem, tag, index)
    assert_same(read_state_dict(tmp_path)[0])


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard_is_named(tmp_path, index):
    names = write_shards(tmp_path, index=index)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete, missing {names[1]}"):
        read_state_dict(tmp_path)


def test_complete_file_is_preferred_to_incomplete_shards(tmp_path):
    (tmp_path / write_shards(tmp_path)[0]).unlink()
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    assert_same(read_state_dict(tmp_path)[0])


def test_shards_that_overlap_are_refused(tmp_path):
    names = write_shards(tmp_path)
    save_file(TENSORS, tmp_path / names[1])
    with pytest.raises(CheckpointError, match=f"{names[1]} repeats a"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_index_cannot_point_outside_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "dtype, tags, chosen",
    [
        (None, ["", ".bf16", ".fp16"], ""),
        (None, [".bf16", ".fp16"], ".bf16"),
        (None, [".fp16"], ".fp16"),
        (torch.bfloat16, ["", ".bf16", ".fp16"], ".bf16"),
        (torch.float16, ["", ".bf16", ".fp16"], ".fp16"),
        (torch.float16, ["", ".bf16"], ""),
        (torch.float32, [".fp32", ".bf16"], ".fp32"),
    ],
)
def test_precision_is_chosen_among_those_there(tmp_path, dtype, tags, chosen):
    for tag in tags:
        save_file(TENSORS, tmp_path / f"diffusion_pytorch_model{tag}.safetensors")
    (file,) = locate_weights(tmp_path, dtype=dtype).files
    assert file.name == f"diffusion_pytorch_model{chosen}.safetensors"


def test_safetensors_is_preferred_to_torch(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "model.pth")
    assert_same(read_state_dict(tmp_path)[0])


def test_standard_name_is_preferred_to_others(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert_same(read_state_dict(tmp_path)[0])


def test_folder_of_several_models_asks_which(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match="several models: x.safetensors, y.safetensors"):
        read_state_dict(tmp_path)


def test_folder_without_weights_says_what_is_there(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(CheckpointError, match="holds no weights.*README.md"):
        read_state_dict(tmp_path)


def test_component_folder_and_its_config(tmp_path):
    (tmp_path / "transformer").mkdir()
    save_file(TENSORS, tmp_path / "transformer" / "model.safetensors")
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 2}')
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / "model.safetensors"):
        source = locate_weights(path, ("transformer",))
        assert source.files[0].name == "model.safetensors" and source.config == {"num_layers": 2}


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        read_json(tmp_path / "config.json")


def test_write_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    write_safetensors(TENSORS, path, {"key": "value"})
    assert_same(load_file(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_written_files_have_the_usual_permissions(tmp_path):
    write_safetensors(TENSORS, tmp_path / "x.safetensors", {})
    (tmp_path / "usual").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_write_that_fails_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written.*free space"):
        write_safetensors(TENSORS, tmp_path / "file" / "x.safetensors", {})


def test_overwriting_a_file_leaves_tensors_read_from_it_alone(tmp_path):
    write_safetensors(TENSORS, tmp_path / "x.safetensors", {})
    state_dict, _ = read_state_dict(tmp_path / "x.safetensors")
    write_safetensors({key: tensor + 1 for key, tensor in TENSORS.items()}, tmp_path / "x.safetensors", {})
    assert_same(state_dict)


def test_views_into_larger_tensors_are_written_alone(tmp_path):
    write_safetensors({"row": TENSORS["a"][1:]}, tmp_path / "x.safetensors", {})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["row"], TENSORS["a"][1:])
