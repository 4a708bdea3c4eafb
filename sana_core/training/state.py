"""The state of a training run on disk: one folder per saved step, complete or absent, whenever the run is killed."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"step_(\d{8})")
_STATE, _MANIFEST = "state.pt", "manifest.json"


def save_state(run: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Writes `run/step_NNNNNNNN` and removes all but the newest `keep` of its kind.

    The folder gets its name only when everything in it is on the disk; the manifest is written last.

    Args:
        run: folder of the run.
        step: how many steps are done.
        state: tensors, numbers, strings, and dicts and lists of them.
        keep: how many saved steps stay.

    Raises:
        OSError: the disk is full or read-only; what was saved before is untouched.
    """
    run.mkdir(parents=True, exist_ok=True)
    folder = run / f"step_{step:08d}"
    partial = run / f"{folder.name}.tmp-{os.getpid()}"
    try:
        partial.mkdir()
        with open(partial / _STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with open(partial / _MANIFEST, "w") as file:
            json.dump({"step": step, "files": {_STATE: (partial / _STATE).stat().st_size}}, file)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _saved_steps(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_newest_state(run: Path) -> dict | None:
    """The state of the newest complete folder of `run`, on the CPU; None where there is none."""
    for folder in reversed(_saved_steps(run)):
        if _is_complete(folder):
            logger.info("Resuming from %s", folder)
            return torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        logger.warning("%s is incomplete: using the one before it", folder)
    return None


def _saved_steps(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("step_*") if _FOLDER.fullmatch(folder.name))


def _is_complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False
