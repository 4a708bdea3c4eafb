"""Saved steps are complete or absent, whatever happens while they are written."""

import errno
import subprocess
import sys

import pytest
import torch

from sana_core.training.lock import run_lock
from sana_core.training.state import newest_state, save_state
from tests import tiny

from .micro import run


def save(folder, step):
    return save_state(folder, step, lambda path: (path / "weights").write_bytes(b"%8d" % step * 99), {"step": step})


def test_newest_state_comes_back(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    folder, progress = newest_state(tmp_path)
    assert progress == {"step": 3}
    assert (folder / "weights").read_bytes() == b"       3" * 99
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_no_state_is_none(tmp_path):
    assert newest_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("harm", ["truncated", "changed", "no manifest", "half a manifest", "no weights"])
def test_damaged_state_falls_back_to_the_one_before(tmp_path, harm, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    manifest, content = newest / "manifest.json", newest / "weights"
    if harm == "truncated":
        content.write_bytes(content.read_bytes()[:9])
    elif harm == "changed":
        content.write_bytes(b"3" * content.stat().st_size)
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "half a manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        content.unlink()
    assert newest_state(tmp_path)[1] == {"step": 1}
    assert "step_00000002 is incomplete or damaged" in caplog.text


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_what_was_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 2, full, {})
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_00000001"]
    assert newest_state(tmp_path)[1] == {"step": 1}


def test_torch_on_a_full_device_is_an_os_error(tmp_path):
    def write(folder):
        with open("/dev/full", "wb") as file:
            torch.save({"weights": torch.zeros(100_000)}, file)

    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 1, write, {})
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_when_the_disk_is_full_and_saves_later(tmp_path, monkeypatch, caplog):
    """Full at steps 20 and 22, with space again at step 24."""
    tries = []

    def sometimes_full(folder, step, *args, **kwargs):
        tries.append(step)
        return full() if step in (20, 22) else save_state(folder, step, *args, **kwargs)

    monkeypatch.setattr("sana_core.training.run.save_state", sometimes_full)
    run(tmp_path, steps=45, save_every=20, size=1, keep=9)
    assert tries == [20, 22, 24, 40, 45]
    assert "Step 20 could not be saved" in caplog.text
    assert newest_state(tmp_path)[1]["step"] == 45


def test_the_last_state_must_be_saved(tmp_path, monkeypatch):
    run(tmp_path, steps=2, size=1)
    monkeypatch.setattr("sana_core.training.run.save_state", full)
    with pytest.raises(OSError, match="step 3 could not be saved.*The newest one there is of step 2"):
        run(tmp_path, steps=3, size=1)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with run_lock(tmp_path), pytest.raises(RuntimeError, match=r"is in use by process \d+ on .*another folder"):
        run(tmp_path, steps=1)
    run(tmp_path, steps=1)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from sana_core.training.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    with run_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        run(tmp_path / "file")


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / "step_00000009.partial").mkdir()
    run(tmp_path, steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.lock", "step_00000002"]


def test_the_random_state_comes_back(tmp_path):
    torch.manual_seed(5)
    run(tmp_path, steps=2)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    run(tmp_path, steps=2)
    assert torch.equal(torch.rand(3), drawn)


def test_a_state_of_another_model_is_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="of another model"):
        run(tmp_path, tiny.transformer(qk_norm=True), steps=3)
