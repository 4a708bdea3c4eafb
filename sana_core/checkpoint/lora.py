"""LoRA files in every trainer's spelling of the keys, to additions to the official weights.

Spellings: diffusers and PEFT, OneTrainer's four formats, SimpleTuner, kohya, ComfyUI's own training node. Each names
a module of the official transformer or of diffusers' by a dotted path or by one with underscores, below some prefix.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import SanaConfig
from ..models.lora import LoraLayer
from ..models.sana import SanaTransformer
from .families import describe_keys, describe_lora
from .files import CheckpointError, StateDict, locate_weights, read_files, read_json
from .keys import diffusers_names, transformer_rules

_PREFIX = re.compile(r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|(?:lora_)?transformer\.)*")
_FLAT_PREFIX = re.compile(r"lora_unet_|lora_transformer_|lycoris_")
_TENSOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<part>A|B|down|up)(?:\.\w+)?(?:\.weight)?"  # PEFT, with or without an adapter's name; kohya
    r"|[._]lora(?:_linear_layer)?\.(?P<old_part>down|up)\.weight"  # diffusers before PEFT
    r"|\.(?P<other>alpha|diff_b|diff)"
    r")"
)
_PARTS = {"A": "down", "B": "up"}
_OTHER_METHOD = re.compile(
    r"(?P<stem>.+?)\.(?P<method>dora_scale|lora_magnitude_vector|lokr|hada|oft|boft|lora_mid)(?:_\w+)?(?:\.\w+)*"
)
_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr": "LoKr",
    "hada": "LoHa",
    "oft": "OFT",
    "boft": "BOFT",
    "lora_mid": "a Tucker-decomposed LoRA",
}
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration


@dataclass(frozen=True)
class Lora:
    """A LoRA file, read for one model."""

    layers: tuple[LoraLayer, ...]
    matched: tuple[str, ...]  # keys of the file that became layers
    unmatched: tuple[str, ...]  # keys that name nothing in the model

    @property
    def summary(self) -> str:
        """How many keys matched, and the first of those that did not."""
        count = len(self.matched) + len(self.unmatched)
        text = f"{len(self.matched)} of {count} keys matched, {len(self.layers)} weights changed"
        if not self.unmatched:
            return text
        rest = f" and {len(self.unmatched) - 3} more" if len(self.unmatched) > 3 else ""
        return f"{text}; not in this model: {', '.join(self.unmatched[:3])}{rest}"


@dataclass(frozen=True)
class _Target:
    """What a name in a file stands for: a weight of the model, or some of its rows."""

    key: str
    rows: tuple[int, int] | None
    shape: tuple[int, int]  # outputs, inputs

    def make_layer(self, down: Tensor, up: Tensor, scale: float) -> LoraLayer:
        return LoraLayer(self.key, self.rows, down, up, scale)


def read_lora(path: str | Path, config: SanaConfig) -> Lora:
    """Read a LoRA file for the model of this architecture.

    Args:
        path: a file, or a folder that holds one, such as PEFT writes.

    Raises:
        CheckpointError: no LoRA, one for another model, another method than LoRA, tensors that are missing, do not
            fit or are not finite.
    """
    source = locate_weights(path)
    state_dict, metadata = read_files(source.files)
    if METADATA_KEY in metadata:
        adapter_config = _parse_metadata(metadata[METADATA_KEY], path)
    elif source.files[0].stem == "adapter_model":
        adapter_config = read_json(source.folder / "adapter_config.json") or {}
    else:
        adapter_config = {}
    return convert_lora(state_dict, config, adapter_config=adapter_config, path=path)


def _parse_metadata(text: str, path: str | Path) -> dict:
    """PEFT's configuration as diffusers writes it, without the "transformer." before each name."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {METADATA_KEY} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its metadata {METADATA_KEY} is not a JSON object.")
    return {name.removeprefix("transformer."): value for name, value in content.items()}


def convert_lora(state_dict: StateDict, config: SanaConfig, *, adapter_config: dict, path: str | Path) -> Lora:
    """What the tensors of a file add to the model of this architecture.

    Args:
        adapter_config: PEFT's configuration, for the alpha of files that hold none as a tensor; may be empty.
        path: of the file, for messages.

    Raises:
        CheckpointError: see `read_lora`.
    """
    targets = _Targets(config)
    _refuse_other_methods(state_dict, targets, path)
    modules, unmatched = _group(state_dict, targets)
    if not modules:
        raise CheckpointError(
            f"{path}: none of its {len(state_dict)} keys names a layer of a Sana transformer; "
            f"{_describe(state_dict)}. Choose a LoRA that was trained on Sana."
        )
    layers = []
    for stem, keys in modules.items():
        layers += _make_layers(stem, keys, state_dict, targets, adapter_config, path)
    _refuse_repetition(layers, path)
    matched = tuple(key for keys in modules.values() for key in keys.values())
    return Lora(tuple(layers), matched, unmatched)


class _Targets:
    """The weights of a transformer under all names that files use for their modules."""

    def __init__(self, config: SanaConfig):
        weights = SanaTransformer(config, device="meta").state_dict()
        rules = transformer_rules(weights)
        self._dotted: dict[str, _Target] = {}
        for key, weight in weights.items():
            outputs, inputs = weight.shape[0], weight.shape[1:].numel()
            self._dotted[key] = _Target(key, None, (outputs, inputs))
            names = diffusers_names(key, rules)
            part = outputs // max(len(names), 1)
            for index, name in enumerate(names):
                rows = (index * part, part) if len(names) > 1 else None
                self._dotted[name] = _Target(key, rows, (part, inputs))
        self._flat = {_flatten(name): target for name, target in self._dotted.items()}

    def find(self, stem: str, *, bias: bool = False) -> _Target | None:
        """The weight, or the bias, of the module that a file calls `stem`; a parameter that is no module's, too."""
        for suffix in (".bias",) if bias else (".weight", ""):
            name = stem + suffix
            target = self._dotted.get(_PREFIX.sub("", name, count=1))
            if target is None and (prefix := _FLAT_PREFIX.match(name)):
                target = self._flat.get(name[prefix.end() :])
            if target is not None:
                return target
        return None


def _flatten(name: str) -> str:
    """The name with underscores for dots, but for the last where it says which of a module's two parameters it is."""
    module, dot, parameter = name.rpartition(".")
    if parameter in ("weight", "bias"):
        return module.replace(".", "_") + dot + parameter
    return name.replace(".", "_")


def _group(state_dict: StateDict, targets: _Targets) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Keys by module, as stem -> part -> key, and the keys that belong to none."""
    modules: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in state_dict:
        match = _TENSOR.fullmatch(key)
        if match is None or targets.find(match["stem"], bias=match["other"] == "diff_b") is None:
            unmatched.append(key)
            continue
        part = match["part"] or match["old_part"] or match["other"]
        modules.setdefault(match["stem"], {})[_PARTS.get(part, part)] = key
    return modules, tuple(unmatched)


def _make_layers(
    stem: str, keys: dict[str, str], state_dict: StateDict, targets: _Targets, adapter_config: dict, path: str | Path
) -> Iterator[LoraLayer]:
    differences = [part for part in ("diff", "diff_b") if part in keys]
    for part in differences:
        yield _difference(keys[part], state_dict, targets.find(stem, bias=part == "diff_b"), path)
    if {"down", "up"} <= keys.keys():
        yield _low_rank(stem, keys, state_dict, targets.find(stem), adapter_config, path)
    elif not differences or {"down", "up"} & keys.keys():
        found = ", ".join(keys.values())
        raise CheckpointError(f"{path} is incomplete: of {stem} it has only {found}. Download it again.")


def _low_rank(
    stem: str, keys: dict[str, str], state_dict: StateDict, target: _Target, adapter_config: dict, path: str | Path
) -> LoraLayer:
    down, up = state_dict[keys["down"]], state_dict[keys["up"]]
    rank = down.shape[0] if down.ndim else 0
    shapes = [tuple(up.flatten(1).shape) if up.ndim > 1 else (), tuple(down.flatten(1).shape) if down.ndim > 1 else ()]
    outputs, inputs = target.shape
    if shapes != [(outputs, rank), (rank, inputs)] or not rank:
        raise CheckpointError(
            f"{path} does not fit: {keys['up']} {list(up.shape)} and {keys['down']} {list(down.shape)} instead of "
            f"[{outputs}, rank] and [rank, {inputs}]. Most likely it was trained for a Sana of another size."
        )
    _require_finite(down, keys["down"], path)
    _require_finite(up, keys["up"], path)
    if "alpha" in keys:
        scale = state_dict[keys["alpha"]].item() / rank
    else:
        scale = _adapter_scale(_PREFIX.sub("", stem, count=1), rank, adapter_config)
    return target.make_layer(down, up, scale)


def _adapter_scale(module: str, rank: int, adapter_config: dict) -> float:
    """alpha / rank as PEFT has it; 1 where nothing is said of it, as in diffusers."""
    alpha = adapter_config.get("lora_alpha", rank)
    for pattern, value in (adapter_config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return alpha / (rank**0.5 if adapter_config.get("use_rslora") else rank)


def _difference(key: str, state_dict: StateDict, target: _Target, path: str | Path) -> LoraLayer:
    """A whole difference as two factors, the smaller of them an identity."""
    difference = state_dict[key]
    shape = (difference.shape[0], difference.shape[1:].numel()) if difference.ndim else ()
    if shape != target.shape:
        raise CheckpointError(
            f"{path} does not fit: {key} {list(difference.shape)} instead of {list(target.shape)}. "
            "Most likely it was trained for a Sana of another size."
        )
    _require_finite(difference, key, path)
    difference = difference.reshape(shape)
    identity = torch.eye(min(shape)).to(difference.dtype)
    down, up = (identity, difference) if shape[1] <= shape[0] else (difference, identity)
    return target.make_layer(down, up, 1.0)


def _require_finite(tensor: Tensor, key: str, path: str | Path) -> None:
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{path}: {key} holds NaN or infinity. Its training diverged; take an earlier file.")


def _refuse_other_methods(state_dict: StateDict, targets: _Targets, path: str | Path) -> None:
    for key in state_dict:
        match = _OTHER_METHOD.fullmatch(key)
        if match and targets.find(match["stem"]):
            raise CheckpointError(
                f"{path} is {_METHODS[match['method']]}, by its key {key}. Only plain LoRA can be applied: "
                "train or export it as one."
            )


def _refuse_repetition(layers: list[LoraLayer], path: str | Path) -> None:
    seen = set()
    for layer in layers:
        if (layer.key, layer.rows) in seen:
            raise CheckpointError(f"{path} holds {layer.key} twice, in two spellings. Take the file as it was trained.")
        seen.add((layer.key, layer.rows))


def _describe(state_dict: StateDict) -> str:
    is_lora = any(match and not match["other"] for match in map(_TENSOR.fullmatch, state_dict))
    adds_to_a_model = is_lora or any(map(_OTHER_METHOD.fullmatch, state_dict))
    return describe_lora(state_dict) if adds_to_a_model else describe_keys(state_dict)
