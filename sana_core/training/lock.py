"""One process at a time in the folder of a run, on every system that ComfyUI runs on."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = "run.lock"
_LOCKED_BYTE = 1 << 30  # far behind the text: on Windows nobody else may read a locked byte


class RunInUse(RuntimeError):
    """Another process trains in the folder."""


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds the folder of a run for this process; the system lets go of it when the process ends, however it does.

    Raises:
        RunInUse: another process trains there.
        OSError: the folder cannot be written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"{run} cannot be the folder of a run ({error.strerror}). Expected a folder that can be written to, or the "
            "name of a new one: choose another."
        ) from error
    with lock as file:
        if not _try_lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunInUse(f"{run} is in use by {owner}. Stop that run, or choose another folder.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    """Locks the file for as long as it is open; False if another has it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # of fcntl, of msvcrt
        return False
    return True
