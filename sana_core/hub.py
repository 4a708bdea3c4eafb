"""Published files from the hub to the user's disk: whole, checked, and going on where they were cut off.

A file gets its name when it is whole. Until then it lies beside its place as `<file name>.<version>.part`.
`hf_hub_download` is not used: since huggingface_hub 2 it deletes what it has when it is cut off.
"""

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import build_hf_headers

from .published import PublishedFile, describe_size, find_published, with_parts

logger = logging.getLogger(__name__)

SIZE_TOLERANCE = 0.001  # of the table; what is predicted there is off by some bytes of header
# The HTTP library differs between versions of huggingface_hub: its errors are known by what the hub's derive from.
_NETWORK_ERRORS = (*HfHubHTTPError.__bases__, OSError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_ARGUMENTS = {"diffusion_models": "transformer", "vae": "vae", "text_encoders": "text_encoder"}
_SHA256 = re.compile(r"[0-9a-f]{64}")

Watch = Callable[[PublishedFile, int], None]


class DownloadError(OSError):
    """What stopped a download: says what was found, what is kept and what to do."""


def download(
    files: Iterable[PublishedFile],
    folder_of: Callable[[PublishedFile], Path],
    *,
    watch: Watch = lambda file, done: None,
) -> Iterator[tuple[Path, bool]]:
    """Fetch what is not there yet, one file after the other.

    Args:
        folder_of: the folder that a file belongs in; made if it is missing.
        watch: called with the file and its bytes so far, several times a second on a usual line. What it raises ends
            the download; the part that is there is kept.

    Yields:
        Path of each file when it is in place, and whether it was there before.

    Raises:
        DownloadError: no room, no network, no permission, another file in its place, or a wrong one at the hub.
    """
    places = [(file, folder_of(file)) for file in files]
    missing = [(file, folder) for file, folder in places if not _is_present(file, folder)]
    _require_space(missing)
    for file, folder in places:
        present = (file, folder) not in missing
        yield (folder / file.filename if present else _fetch(file, folder, watch)), present


def _is_present(file: PublishedFile, folder: Path) -> bool:
    path = folder / file.filename
    if not path.exists():
        return False
    if _fits(path.stat().st_size, file):
        return True
    raise DownloadError(
        f"{path} has {path.stat().st_size:,} bytes, the published file about {file.size:,}: it is truncated, or it is "
        "another file. Move or delete it, then download again"
    )


def _fits(size: int, file: PublishedFile) -> bool:
    return abs(size - file.size) <= SIZE_TOLERANCE * file.size


def _require_space(missing: list[tuple[PublishedFile, Path]]) -> None:
    """Each disk has to hold what goes there, all files together, less what is there of them."""
    needed: dict[int, int] = {}
    for file, folder in missing:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        _require_writable(existing)
        disk = existing.stat().st_dev
        needed[disk] = needed.get(disk, 0) + file.size - sum(part.stat().st_size for part in _parts(file, folder))
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise DownloadError(
                f"{existing}: {describe_size(free)} are free on this disk, and {describe_size(needed[disk])} or more "
                "are needed. Make room, or choose another folder"
            )


def _require_writable(folder: Path) -> None:
    """By writing there, since permissions alone do not tell: a disk may be read-only, or no disk at all."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}. Choose another folder") from error


def _parts(file: PublishedFile, folder: Path) -> list[Path]:
    return list(folder.glob(f"{file.filename}.*.part"))


def _fetch(file: PublishedFile, folder: Path, watch: Watch) -> Path:
    metadata = _ask_hub(file)
    part = folder / f"{file.filename}.{_version(metadata)[:12]}.part"
    for other in set(_parts(file, folder)) - {part}:
        other.unlink()  # of a version that the hub no longer offers
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _fill(part, file, metadata, watch)
        _check_content(part, file, metadata, watch)
        os.replace(part, folder / file.filename)
    except DownloadError:
        raise
    except _NETWORK_ERRORS as error:
        raise _cut_off(error, file, part) from error
    return folder / file.filename


def _ask_hub(file: PublishedFile) -> HfFileMetadata:
    """What the hub says of the file, if that is what the table has. Raises DownloadError."""
    try:
        metadata = get_hf_file_metadata(hf_hub_url(file.repository, file.path))
    except _NETWORK_ERRORS as error:
        raise DownloadError(_reason(error, file)) from error
    if None in (metadata.size, metadata.etag, metadata.commit_hash):
        raise DownloadError(f"what answers for {file.page} is no hub. Check the network, a proxy's page, HF_ENDPOINT")
    if not _fits(metadata.size, file):
        raise DownloadError(
            f"{file.page} has a {file.path} of {metadata.size:,} bytes, expected about {file.size:,}. It is not the "
            "file that this version of the pack knows, and was not downloaded. Update the pack, or get it by hand"
        )
    return metadata


class _Part(io.BufferedWriter):
    """An unfinished file, written on at its end, that says how far it is."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(io.FileIO(path, "a"))
        self.report = report
        report(self.tell())

    def write(self, content: bytes) -> int:
        written = super().write(content)
        self.report(self.tell())
        return written


def _fill(part: Path, file: PublishedFile, metadata: HfFileMetadata, watch: Watch) -> None:
    url = hf_hub_url(file.repository, file.path, revision=metadata.commit_hash)
    # Compressed on the way, a file cannot be gone on with from a byte's number.
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
    with _Part(part, lambda done: watch(file, done)) as stream:
        done = stream.tell()
        if done < metadata.size:
            logger.info("%s: from byte %d of %d", file.filename, done, metadata.size)
            http_get(url, stream, resume_size=done, headers=headers, displayed_filename=file.filename)


def _check_content(part: Path, file: PublishedFile, metadata: HfFileMetadata, watch: Watch) -> None:
    """Size and, where the hub states it, SHA-256. What is wrong is deleted, for it cannot be mended."""
    size = part.stat().st_size
    if size < metadata.size:
        raise ConnectionError(f"it ended after {size:,} of {metadata.size:,} bytes")
    expected = _version(metadata)
    if size == metadata.size and (not _SHA256.fullmatch(expected) or _sha256(part, file, watch) == expected):
        return
    part.unlink()
    raise DownloadError(
        f"{file.filename}: what came is not what the hub has, by its {size:,} bytes of {metadata.size:,} or by its "
        "checksum. It was deleted. Download it again"
    )


def _version(metadata: HfFileMetadata) -> str:
    """SHA-256 of a large file, another hash of a small one: the ETag, as far as it can stand in a file's name."""
    return re.sub(r"\W", "", metadata.etag)


def _sha256(path: Path, file: PublishedFile, watch: Watch) -> str:
    digest, done = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            watch(file, done)
    return digest.hexdigest()


def _cut_off(error: Exception, file: PublishedFile, part: Path) -> DownloadError:
    if _status(error) == 416:  # the hub has no byte after those: they are of no use
        part.unlink()
    kept = part.stat().st_size if part.exists() else 0
    reason = _reason(error, file)
    return DownloadError(f"{file.filename}: {reason}. {describe_size(kept)} are kept: the same download goes on there")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception, file: PublishedFile) -> str:
    """In plain words. The token is in none of them."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids downloads. Unset it, or put the file there by hand"
    status = _status(error)
    if status in (401, 403):
        return (
            f"{file.page} does not give it to everyone (status {status}). Open that page, sign in and accept its "
            "licence, then set HF_TOKEN to an access token of yours: it is read from there"
        )
    if status == 404:
        return f"{file.page} has no {file.path} (any more). Update the pack, or look for the file there"
    if status is not None:
        return f"the hub answered with status {status}. Try again later"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return "the disk is full. Make room"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"it cannot be written: {error.strerror}{f' ({error.filename})' if error.filename else ''}"
    reason = str(error) or type(error).__name__
    return f"the connection to {constants.ENDPOINT} failed ({reason}). Check the network, or HF_ENDPOINT"


def comfyui_models() -> Path | None:
    """The models folder of the ComfyUI in whose custom_nodes this pack lies; None if it lies elsewhere."""
    pack = Path(__file__).absolute().parents[1]
    models = pack.parents[1] / "models"
    return models if pack.parent.name == "custom_nodes" and models.is_dir() else None


def fetch_model(name: str) -> dict[str, Path]:
    """The three files of a model of the table, by the arguments of `SanaPipeline.from_files`, fetched if missing.

    They go where the ComfyUI around this pack looks for them, else to `sana` in the cache of Hugging Face (HF_HOME).
    Raises ValueError for a name or repository that is no model of the table, DownloadError as `download` does.
    """
    file = find_published(name)
    if file.folder != "diffusion_models":
        raise ValueError(f"{name} is no model that draws pictures on its own: it belongs in models/{file.folder}")
    models = comfyui_models() or Path(constants.HF_HOME) / "sana"
    files = {_ARGUMENTS[part.folder]: part for part in with_parts(file)}
    paths = [path for path, _ in download(files.values(), lambda part: models / part.folder)]
    return dict(zip(files, paths, strict=True))
