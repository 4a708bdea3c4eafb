"""Tensors on disk by key, in safetensors files that are written once, whole, and never changed.

Any number of processes may use one folder at once: each writes files of its own under names that nobody else has, and
a file gets its name only when everything in it is on the disk. A key that two of them wrote is there twice, with the
same content.
"""

import logging
import os
import time
import uuid
from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PARTIAL = ".part"
MAX_OPEN = 64  # files mapped at once; the system's limit on open ones is often 1,024
FLUSH_BYTES = 64 * 2**20
FLUSH_SECONDS = 20.0  # what a kill costs at most
STALE_SECONDS = 24 * 3600  # a partial file of that age belongs to nobody who is still alive


class Shards:
    """A growing map from keys to tensors in a folder."""

    def __init__(self, folder: Path):
        """`folder` is made if need be. Raises OSError if that fails."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"The cache {folder} cannot be made ({error.strerror}). Choose another folder") from error
        self._files: dict[str, Path] = {}  # key -> file
        self._known: set[str] = set()  # names of files
        self._open: OrderedDict[Path, safe_open] = OrderedDict()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._remove_stale_parts()
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have written since. A damaged file is removed, so that it is made again."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._known:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    keys = list(file.keys())
            except FileNotFoundError:  # another process found it damaged first
                continue
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged (%s): what was in it is computed again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._known.add(path.name)
            self._files |= dict.fromkeys(keys, path)

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._files

    def __len__(self) -> int:
        return len(self._files.keys() | self._pending.keys())

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, on the CPU. Raises KeyError; OSError where its file vanished or was damaged meanwhile."""
        if key in self._pending:
            return self._pending[key]
        path = self._files[key]
        try:
            return self._mapped(path).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} cannot be read any more ({error}). Start again: it will be computed anew") from error

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor; it is on the disk after the next `flush`, which comes by itself every now and then."""
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would keep all of its storage, and the format refuses it
        self._pending[key] = tensor
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= FLUSH_BYTES or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added. Raises OSError if the disk is full; what was added is still there then."""
        self._last_flush = time.monotonic()
        if not self._pending:
            return
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        partial = path.with_suffix(PARTIAL)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(self._pending, partial, metadata={"format": "pt"})
            partial.chmod(mode)  # safetensors makes files that only their owner may read
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} could not be written ({error}). Check the free space and the folder") from error
        finally:
            partial.unlink(missing_ok=True)
        self._known.add(path.name)
        self._files |= dict.fromkeys(self._pending, path)
        self._pending, self._pending_bytes = {}, 0

    def _mapped(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _remove_stale_parts(self) -> None:
        for path in self.folder.glob(f"*{PARTIAL}"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # its owner has just finished it, or another process removed it
                continue
