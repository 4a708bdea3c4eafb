"""Tensors on disk: whole or absent, shared by several processes, damaged files made again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sana_core.training import shards
from sana_core.training.shards import Shards

ROOT = Path(__file__).parents[2]


def tensor(number):
    return torch.full((3, 2), float(number), dtype=torch.bfloat16)


def test_what_was_added_is_there_again(tmp_path):
    first = Shards(tmp_path / "new" / "folder")
    for number in range(5):
        first.add(str(number), tensor(number))
    assert len(first) == 5 and torch.equal(first["3"], tensor(3)), "before it is written"
    first.flush()
    first.flush()
    assert len(list(first.folder.iterdir())) == 1, "nothing is written twice"
    second = Shards(first.folder)
    assert len(second) == 5 and "4" in second and "5" not in second
    for store in (first, second):
        assert all(torch.equal(store[str(number)], tensor(number)) for number in range(5))
        assert store["0"].dtype == torch.bfloat16
    with pytest.raises(KeyError):
        second["5"]


def test_others_can_read_the_files(tmp_path):
    store = Shards(tmp_path)
    store.add("a", tensor(1))
    store.flush()
    (path,) = tmp_path.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_view_is_stored_without_the_rest(tmp_path):
    store = Shards(tmp_path)
    store.add("a", torch.zeros(1000, 100)[:3])
    store.flush()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 3 * 100 * 4 + 500
    assert store["a"].shape == (3, 100)


def test_it_writes_by_itself_when_much_has_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FLUSH_BYTES", 3 * tensor(0).nbytes)
    store = Shards(tmp_path)
    for number in range(7):
        store.add(str(number), tensor(number))
    assert len(list(tmp_path.iterdir())) == 2 and len(Shards(tmp_path)) == 6


def test_it_writes_by_itself_when_time_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FLUSH_SECONDS", 0.0)
    Shards(tmp_path).add("a", tensor(1))
    assert "a" in Shards(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_file_is_removed_and_named(tmp_path, damage, caplog):
    store = Shards(tmp_path)
    for key in ("a", "b"):
        store.add(key, tensor(1))
        store.flush()
    path = store._files["a"]
    path.write_bytes(damage(path.read_bytes()))
    again = Shards(tmp_path)
    assert "a" not in again and torch.equal(again["b"], tensor(1))
    assert path.name in caplog.text and "damaged" in caplog.text and not path.exists()


def test_a_file_that_vanished_is_named(tmp_path):
    Shards(tmp_path).flush()
    writer = Shards(tmp_path)
    writer.add("a", tensor(1))
    writer.flush()
    reader = Shards(tmp_path)
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(OSError, match="cannot be read any more"):
        reader["a"]


def test_what_another_process_wrote_is_found_by_a_look(tmp_path):
    one, other = Shards(tmp_path), Shards(tmp_path)
    one.add("a", tensor(1))
    one.flush()
    assert "a" not in other
    other.refresh()
    assert torch.equal(other["a"], tensor(1))


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 3)
    store = Shards(tmp_path)
    for number in range(10):
        store.add(str(number), tensor(number))
        store.flush()
    for number in [*range(10), *range(10)]:
        assert torch.equal(store[str(number)], tensor(number))
    assert len(store._open) == 3


def test_only_old_partial_files_are_removed(tmp_path):
    young, old = tmp_path / "young.part", tmp_path / "old.part"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * shards.STALE_SECONDS,) * 2)
    Shards(tmp_path)
    assert young.exists() and not old.exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = Shards(tmp_path)
    store.add("a", tensor(1))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        with pytest.raises(OSError, match="could not be written.*No space left.*Check the free space"):
            store.flush()
    assert list(tmp_path.iterdir()) == []
    store.flush()
    assert torch.equal(Shards(tmp_path)["a"], tensor(1)), "what was added is not lost"


WRITER = """
import sys, torch
from pathlib import Path
from sana_core.training import shards
shards.FLUSH_BYTES = 64
store = shards.Shards(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 200, int(sys.argv[3])):
    store.refresh()
    if str(number) not in store:
        store.add(str(number), torch.full((5,), float(number)))
store.flush()
"""


def test_two_processes_write_at_once(tmp_path):
    """One counts by one, the other by two: half of the keys are wanted by both."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, "0", step], cwd=ROOT) for step in ("1", "2")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    store = Shards(tmp_path)
    assert len(store) == 200
    assert all(torch.equal(store[str(number)], torch.full((5,), float(number))) for number in range(200))
    for path in tmp_path.iterdir():
        assert path.suffix == ".safetensors"
        with safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) > 0
