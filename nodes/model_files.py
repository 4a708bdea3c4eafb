"""Which models the loaders offer: files, and folders as Hugging Face's libraries write them."""

import json
import re
from pathlib import Path

import folder_paths

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")

# Class names in config.json that belong to each of ComfyUI's model folders.
_CLASSES = {
    "diffusion_models": ("SanaTransformer2DModel",),
    "controlnet": ("SanaControlNetModel",),
    "vae": ("AutoencoderDC", "DCAE_HF"),
    "text_encoders": ("Gemma2ForCausalLM", "Gemma2Model"),
    "clip_vision": ("CLIPModel",),
}


def list_models(kind: str) -> list[str]:
    """Names to choose from in ComfyUI's folder `kind`: files, then sub-folders that hold a config.json.

    Shards are left out, since only their folder is a whole model.
    """
    names = folder_paths.get_filename_list(kind)
    return [name for name in names if not _SHARD.search(name)] + list_model_folders(kind)


def list_model_folders(kind: str) -> list[str]:
    """Names of the sub-folders of ComfyUI's folder `kind` that hold a config.json of such a model."""
    parents = {str(Path(name).parent) for name in folder_paths.get_filename_list(kind)} - {"."}
    return [name for name in sorted(parents) if _is_model_folder(kind, name)]


def find_model(kind: str, name: str) -> Path:
    """Path of a name that `list_models` offered. Raises FileNotFoundError."""
    return _find_folder(kind, name) or Path(folder_paths.get_full_path_or_raise(kind, name))


def _find_folder(kind: str, name: str) -> Path | None:
    for base in folder_paths.get_folder_paths(kind):
        path = Path(base, name)
        if path.is_dir() and folder_paths.is_within_directory(base, str(path)):
            return path
    return None


def _is_model_folder(kind: str, name: str) -> bool:
    path = _find_folder(kind, name)
    if path is None or not (path / "config.json").is_file():
        return False
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return True  # the loader says what is wrong with it
    classes = [config.get("_class_name"), *(config.get("architectures") or [])] if isinstance(config, dict) else []
    named = [name for name in classes if name]
    return not named or any(name in _CLASSES[kind] for name in named)
