"""The lock of a run where Python has no fcntl, as on Windows."""

import os
import subprocess
import sys
import types

import pytest

from sana_core.training import lock
from sana_core.training.lock import RunInUse, run_lock

from ..conftest import ROOT


@pytest.fixture
def windows(monkeypatch):
    """A stand-in for msvcrt: who opens a file again cannot lock a byte that is locked. Returns what was locked."""
    locked = []

    def locking(descriptor, mode, count):
        byte = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if byte in locked:
            raise PermissionError(13, "Permission denied")
        locked.append(byte)

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    return locked


def test_two_runs_cannot_share_a_folder_on_windows(tmp_path, windows):
    with run_lock(tmp_path), pytest.raises(RunInUse, match=r"is in use by process \d+ on "), run_lock(tmp_path):
        pass
    ((_, byte),) = windows
    assert byte > (tmp_path / "run.lock").stat().st_size, "its text stays readable"


def test_the_trainer_is_imported_where_there_is_no_fcntl():
    code = (
        "import sys, torch, types; sys.modules['fcntl'] = None; sys.modules['msvcrt'] = types.ModuleType('msvcrt')\n"
        "import sana_core.training.loop"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
