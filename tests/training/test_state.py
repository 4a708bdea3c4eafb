"""Saved steps are complete or absent, whatever happens while they are written."""

import errno

import pytest
import torch

from sana_core.training.state import load_newest_state, save_state


def saved(step):
    return {"step": step, "weights": torch.full((3,), float(step))}


def test_newest_state_comes_back(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, saved(step))
    state = load_newest_state(tmp_path)
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.full((3,), 3.0))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_no_state_is_none(tmp_path):
    assert load_newest_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("harm", ["truncated", "no manifest"])
def test_damaged_state_falls_back_to_the_one_before(tmp_path, harm):
    save_state(tmp_path, 1, saved(1))
    newest = save_state(tmp_path, 2, saved(2))
    if harm == "truncated":
        content = (newest / "state.pt").read_bytes()
        (newest / "state.pt").write_bytes(content[: len(content) // 2])
    else:
        (newest / "manifest.json").unlink()
    assert load_newest_state(tmp_path)["step"] == 1


def test_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    save_state(tmp_path, 1, saved(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sana_core.training.state.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 2, saved(2))
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_00000001"]
    assert load_newest_state(tmp_path)["step"] == 1


def test_partial_folders_are_not_read(tmp_path):
    (tmp_path / "step_00000009.tmp-123").mkdir()
    save_state(tmp_path, 1, saved(1))
    assert load_newest_state(tmp_path)["step"] == 1
