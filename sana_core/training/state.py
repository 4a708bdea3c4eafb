"""The state of a training run on disk: one folder per saved step, complete or absent, whenever the run is killed."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "run.lock"
_FOLDER = re.compile(r"step_(\d{8})")
_PARTIAL = ".partial"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds the folder of a run for this process; the system lets go of it when the process ends, however it does.

    Raises:
        RuntimeError: another process trains there.
        OSError: the folder cannot be written to.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RuntimeError(f"{run} is in use by {owner}. Stop that run, or choose another folder.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def save_state(
    run: Path, step: int, write: Callable[[Path], None], progress: dict[str, Any], *, keep: int = 2, group=None
) -> Path:
    """Writes `run/step_NNNNNNNN` and removes all but the newest `keep` of its kind.

    The folder gets its name only when everything in it is on the disk and its manifest, with the hashes of all
    files, was written last. Older folders are removed only after that.

    Args:
        run: folder of the run.
        step: how many steps are done.
        write: writes the state into the folder that it is given; called on every rank.
        progress: what `newest_state` shall return, as JSON has it.
        keep: how many saved steps stay.
        group: the ranks (`distributed.Single` and its kin) that write together; None: this process alone.

    Raises:
        OSError: the disk is full or read-only, on whichever rank; what was saved before is untouched.
    """
    rank = 0 if group is None else group.rank
    folder = run / f"step_{step:08d}"
    partial = run / (folder.name + _PARTIAL)

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def complete() -> None:
        if rank == 0:
            _write_manifest(partial, step, progress)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            _sync(run)

    try:
        for stage in (begin, lambda: write(partial), complete):
            _together(stage, group)
    except OSError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0 and _sizes_agree(folder):
        for old in _saved_steps(run)[:-keep]:
            shutil.rmtree(old)
    return folder


def _together(stage: Callable[[], None], group) -> None:
    """Runs a stage on all ranks; where it fails on one it fails on all, so that none waits for another."""
    error: OSError | None = None
    try:
        stage()
    except OSError as failure:
        error = failure
    except RuntimeError as failure:  # torch's writer hides what the file told it
        error = OSError(errno.EIO, str(failure)) if failure.__context__ is None else failure.__context__
        if not isinstance(error, OSError):
            raise
    if group is not None and group.sum(error is not None)[0] and error is None:
        error = OSError(errno.EIO, "another rank could not write its part")
    if error is not None:
        raise error


def _write_manifest(partial: Path, step: int, progress: dict[str, Any]) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    entries = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _hash(path)} for path in files
    }
    with open(partial / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"step": step, "progress": progress, "files": entries}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    for folder in {path.parent for path in files} | {partial}:
        _sync(folder)


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest folder of `run` whose files have the hashes of its manifest, and its `progress`; None without one."""
    for folder in reversed(_saved_steps(run)):
        if _sizes_agree(folder) and _hashes_agree(folder):
            return folder, _manifest(folder)["progress"]
        logger.warning("%s is incomplete or damaged: using the one before it", folder)
    return None


def remove_partial(run: Path) -> None:
    """Removes what a killed run left half written. Only for who holds the lock."""
    for folder in run.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def _saved_steps(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("step_*") if _FOLDER.fullmatch(folder.name))


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _sizes_agree(folder: Path) -> bool:
    try:
        files = _manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hashes_agree(folder: Path) -> bool:
    return all(_hash(folder / name) == entry["sha256"] for name, entry in _manifest(folder)["files"].items())


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
