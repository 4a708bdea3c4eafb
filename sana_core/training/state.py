"""The state of a training run on disk: one folder per saved step, complete or absent, whenever the run is killed."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step_(\d{8})")
_PARTIAL = ".partial"


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
        for old in saved_states(run)[:-keep]:
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
    for folder in reversed(saved_states(run)):
        if _sizes_agree(folder) and _hashes_agree(folder):
            return folder, _manifest(folder)["progress"]
        logger.warning("%s is incomplete or damaged: using the one before it", folder)
    return None


def remove_partial(run: Path) -> None:
    """Removes what a killed run left half written. Only for who holds the lock."""
    for folder in run.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def saved_states(run: Path) -> list[Path]:
    """The folders of a run's saved steps, oldest first; whether they are whole is not looked at."""
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
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # it opens no folders, and writes their lists by itself
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
