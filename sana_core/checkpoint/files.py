"""Weights on disk: which files a path stands for, and their tensors, without ever running code from a file."""

import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin")
STANDARD_STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
PRECISION_TAG = re.compile(r"\.(fp32|bf16|fp16)(?=[.-]|$)")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


class CheckpointError(ValueError):
    """A file that cannot be used: says which, what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Source:
    """The files of one model, and the config.json beside them."""

    path: Path  # as the user gave it
    files: tuple[Path, ...]
    config: dict | None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.files[0].parent


def locate_weights(path: str | Path, components: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> Source:
    """Find the files that `path` stands for.

    Args:
        path: a file, a folder that holds one model, or a folder with one of `components` as a sub-folder.
        components: names of the sub-folder in which a pipeline keeps this model, such as "transformer".
        dtype: what the weights will be cast to. Where a folder holds the same model in several precisions, the one
            in `dtype` is read, else the plain one, fp32, bf16 and fp16 in this order.

    Raises:
        CheckpointError: nothing there, a shard missing, or several models to choose from.
    """
    path = Path(path)
    if path.is_file():
        return Source(path, (path,), read_json(path.parent / "config.json"))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Check the path, or download the model.")
    folder = next((path / name for name in components if (path / name).is_dir()), path)
    files = _choose_files(folder, dtype)
    return Source(path, files, read_json(folder / "config.json"))


def read_json(path: Path) -> dict | None:
    """Content of a JSON file that holds an object; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again, or remove it.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def _choose_files(folder: Path, dtype: torch.dtype | None) -> tuple[Path, ...]:
    groups = _weight_groups(folder)
    if not groups:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no weights ({', '.join(WEIGHT_SUFFIXES)}); found: {names}. "
            "Choose the folder or file of one model."
        )
    complete = {name: files for name, files in groups.items() if all(file.is_file() for file in files)}
    if not complete:
        name, files = next(iter(groups.items()))
        missing = ", ".join(file.name for file in files if not file.is_file())
        raise CheckpointError(f"{folder}: {name} is incomplete, missing {missing}. Download the rest of it.")
    models: dict[str, list[str]] = {}
    for name in complete:
        models.setdefault(PRECISION_TAG.sub("", Path(name).stem), []).append(name)
    model = next((stem for stem in STANDARD_STEMS if stem in models), None)
    if model is None and len(models) > 1:
        raise CheckpointError(f"{folder} holds several models: {', '.join(sorted(complete))}. Choose one of the files.")
    names = models[model or next(iter(models))]
    return complete[min(names, key=lambda name: _preference(name, dtype))]


def _preference(name: str, dtype: torch.dtype | None) -> tuple[int, int]:
    tag = PRECISION_TAG.search(Path(name).stem)
    wanted = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype)
    order = [wanted, None, "fp32", "bf16", "fp16"]
    return order.index(tag and tag.group(1)), WEIGHT_SUFFIXES.index(Path(name).suffix)


def _weight_groups(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Sets of files that together hold one model, under the name that an unsharded file would have."""
    groups: dict[str, tuple[Path, ...]] = {}
    sharded: set[str] = set()
    for index in sorted(folder.glob("*.index*.json")):
        names = _shard_names(index)
        sharded.update(names)
        stem, _, rest = index.name.partition(".safetensors.index")
        groups[stem + rest.removesuffix(".json") + ".safetensors"] = tuple(folder / name for name in names)
    for file in sorted(folder.iterdir()):
        if file.suffix not in WEIGHT_SUFFIXES or file.name in sharded or not file.is_file():
            continue
        shard = SHARD.search(file.stem)
        if shard is None:
            groups[file.name] = (file,)
            continue
        stem, count = file.stem[: shard.start()], int(shard.group(2))
        shards = (folder / f"{stem}-{n:05d}-of-{count:05d}{file.suffix}" for n in range(1, count + 1))
        groups[stem + file.suffix] = tuple(shards)
    return groups


def _shard_names(index: Path) -> list[str]:
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, so it is no index of shards. Download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    foreign = [name for name in names if name != Path(name).name or "\\" in name]
    if foreign:
        raise CheckpointError(f"{index} names a shard outside of its folder: {foreign[0]}. Do not use this file.")
    return names


def read_state_dict(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata of a file, or of a folder with one model.

    The tensors are mapped from disk where the format allows it, and read when first used. Keys are the file's own.
    Raises CheckpointError for a file that is no weights, that is truncated, or whose pickle holds code.
    """
    return read_files(locate_weights(path).files)


def read_files(files: tuple[Path, ...]) -> tuple[StateDict, dict[str, str]]:
    """Tensors and metadata of the files together."""
    state_dict: StateDict = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, own_metadata = _read_file(file)
        twice = next((key for key in tensors if key in state_dict), None)
        if twice is not None:
            raise CheckpointError(f"{file} repeats {twice}, which another shard holds. Download the shards again.")
        state_dict |= tensors
        metadata |= own_metadata
    return state_dict, metadata


def _read_file(path: Path) -> tuple[StateDict, dict[str, str]]:
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path, mmap=True), {}
    if head[8:9] == b"{":  # after the header's length, which may begin with any byte
        return _read_safetensors(path)
    if head.startswith(b"\x80"):  # torch.save before version 1.6
        return _read_torch(path, mmap=False), {}
    raise CheckpointError(f"{path} holds no weights: {_describe_head(head)}.")


def _describe_head(head: bytes) -> str:
    if not head:
        return "it is empty. Download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`, or download it"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, perhaps an error page of the server. Download the file itself"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, which this loader does not read. Choose a .safetensors or .pth file"
    if head.lstrip()[:1] == b"{":
        return "it is JSON. Choose the weights beside it, or their folder"
    return f"it begins with {head[:8]!r}, which is neither safetensors nor torch. Download it again"


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Download it again.") from error


def _read_torch(path: Path, mmap: bool) -> StateDict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise CheckpointError(f"{path} is truncated or damaged ({error}). Download it again.") from error
        raise CheckpointError(
            f"{path} holds pickled Python objects besides tensors. They could run code, so the file was not loaded. "
            "Get the model as .safetensors, or convert it where you trust its source."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is truncated or damaged ({reason}). Download it again.") from error
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> StateDict:
    """The tensors of what a trainer saved, which also holds its counters and optimizer state."""
    for name in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)} if _is_dict(content) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds a {type(content).__name__} without tensors, expected a state dict.")
    return tensors


def _is_dict(content: object) -> bool:
    return isinstance(content, dict) and all(isinstance(key, str) for key in content)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends without an error, and vanishes otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}. Check the free space and the folder.") from error


def write_safetensors(state_dict: StateDict, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the tensors at once or not at all."""
    tensors = {}
    for key, tensor in state_dict.items():
        tensor = tensor.detach().to("cpu").contiguous()
        shares_storage = tensor.untyped_storage().nbytes() != tensor.nbytes
        tensors[key] = tensor.clone() if shares_storage else tensor  # the format refuses views into larger storages
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        temporary.chmod(mode)  # safetensors makes files that only their owner may read


def write_json(content: dict, path: str | Path) -> None:
    """Write the object as JSON, at once or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
