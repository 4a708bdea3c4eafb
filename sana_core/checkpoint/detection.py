"""Which model a state dict holds: what the shapes say, and for what they cannot say, who is asked in which order.

Shapes cannot tell the cross-attention heads, the timestep scale, the position embedding, the scaling factor, and which
resolution the weights were trained for. These come from `variant`, config.json, the configuration in the file itself,
or the presets of the same shapes, of which the path's name may choose one.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config import AUTOENCODERS, CONTROLNETS, TRANSFORMERS, DCAEConfig, SanaConfig
from .configuration import (
    CONFIG_KEY,
    PIXELS_PER_LATENT,
    controlnet_from_diffusers,
    dc_ae_from_diffusers,
    parse_config,
    transformer_from_diffusers,
)
from .families import CONTROLNET_SIGNS, DC_AE_SIGNS, TRANSFORMER_SIGNS, describe_keys, find_layout
from .files import CheckpointError, StateDict
from .keys import convert_controlnet, convert_dc_ae, convert_transformer

Shapes = dict[str, tuple[int, ...]]
Sizes = dict[str, object]


@dataclass(frozen=True)
class Kind:
    """How models of one kind are told apart."""

    noun: str
    config: type
    presets: dict
    sizes: Callable[[object], Sizes]  # what shapes would tell of this configuration
    from_diffusers: Callable[[dict], dict | None]


def detect_transformer(
    state_dict: StateDict,
    *,
    variant: str | None = None,
    metadata: dict[str, str] | None = None,
    config_json: dict | None = None,
    path: str | Path = "the state dict",
) -> tuple[SanaConfig, str, str]:
    """Tell which Sana transformer this is.

    Args:
        state_dict: official or diffusers keys, without prefix; tensors on the meta device will do.
        variant: name of a preset, which overrides every other source; it must fit the shapes.
        metadata: of the safetensors file.
        config_json: content of the config.json beside the file.
        path: for messages, and its names are a hint where several presets have these shapes.

    Returns:
        The configuration, the layout ("official" or "diffusers") and the reason, for the log.

    Raises:
        CheckpointError: not a Sana transformer, a source that contradicts the shapes, or sizes that nothing tells.
    """
    layout = find_layout(state_dict, TRANSFORMER_SIGNS)
    if layout is None:
        raise CheckpointError(
            f"{path} is not a Sana transformer: {describe_keys(state_dict)}. Choose a file of a Sana transformer."
        )
    shapes = _official_shapes(state_dict, layout, convert_transformer)
    sizes = _transformer_sizes(shapes, path)
    grid = math.isqrt(state_dict["pos_embed"].shape[1]) if "pos_embed" in state_dict else None
    config, reason = _resolve(_TRANSFORMER, sizes, state_dict, variant, metadata, config_json, Path(path), grid)
    return config, layout, reason


def detect_controlnet(
    state_dict: StateDict,
    *,
    variant: str | None = None,
    metadata: dict[str, str] | None = None,
    config_json: dict | None = None,
    path: str | Path = "the state dict",
) -> tuple[SanaConfig, str, str]:
    """Tell which ControlNet this is. Arguments, result and errors as for `detect_transformer`.

    The configuration's depth is the count of copied blocks.
    """
    layout = find_layout(state_dict, CONTROLNET_SIGNS)
    if layout is None:
        raise CheckpointError(
            f"{path} is not a Sana ControlNet: {describe_keys(state_dict)}. Choose a file of a Sana ControlNet."
        )
    sizes = _controlnet_sizes(_official_shapes(state_dict, layout, convert_controlnet), path)
    config, reason = _resolve(_CONTROLNET, sizes, state_dict, variant, metadata, config_json, Path(path), None)
    return config, layout, reason


def detect_dc_ae(
    state_dict: StateDict,
    *,
    variant: str | None = None,
    metadata: dict[str, str] | None = None,
    config_json: dict | None = None,
    path: str | Path = "the state dict",
) -> tuple[DCAEConfig, str, str]:
    """Tell which DC-AE this is. Arguments, result and errors as for `detect_transformer`.

    The "in" and "mix" models have the same shapes and different scaling factors: without a hint that is an error.
    """
    layout = find_layout(state_dict, DC_AE_SIGNS)
    if layout is None:
        raise CheckpointError(
            f"{path} is not a DC-AE autoencoder: {describe_keys(state_dict)}. Choose a file of a DC-AE."
        )
    sizes = _dc_ae_sizes(_official_shapes(state_dict, layout, convert_dc_ae), path)
    config, reason = _resolve(_DC_AE, sizes, state_dict, variant, metadata, config_json, Path(path), None)
    return config, layout, reason


def _official_shapes(state_dict: StateDict, layout: str, convert: Callable) -> Shapes:
    on_meta = {key: tensor.to("meta") for key, tensor in state_dict.items()}
    return {key: tuple(tensor.shape) for key, tensor in convert(on_meta, layout).items()}


def _shape(shapes: Shapes, key: str, path: object) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"{path} lacks {key}, so it is incomplete. Download it again.")
    return shapes[key]


def _transformer_sizes(shapes: Shapes, path: object) -> Sizes:
    hidden_size, in_channels = _shape(shapes, "x_embedder.proj.weight", path)[:2]
    blocks = [int(match.group(1)) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))]
    glu_width = _shape(shapes, "blocks.0.mlp.inverted_conv.conv.weight", path)[0]
    return {
        "depth": max(blocks) + 1,
        "hidden_size": hidden_size,
        "in_channels": in_channels,
        "caption_channels": _shape(shapes, "y_embedder.y_proj.fc1.weight", path)[1],
        "mlp_ratio": glu_width / 2 / hidden_size,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "guidance_embed": "cfg_embedder.mlp.0.weight" in shapes,
    }


def _transformer_sizes_of(config: SanaConfig) -> Sizes:
    names = ("depth", "hidden_size", "in_channels", "caption_channels", "mlp_ratio", "qk_norm", "guidance_embed")
    return {name: getattr(config, name) for name in names}


def _controlnet_sizes(shapes: Shapes, path: object) -> Sizes:
    glu_width, hidden_size = _shape(shapes, "controlnet.0.copied_block.mlp.inverted_conv.conv.weight", path)[:2]
    blocks = [int(match.group(1)) for key in shapes if (match := re.match(r"controlnet\.(\d+)\.", key))]
    return {
        "depth": max(blocks) + 1,
        "hidden_size": hidden_size,
        "mlp_ratio": glu_width / 2 / hidden_size,
        "qk_norm": "controlnet.0.copied_block.attn.q_norm.weight" in shapes,
    }


def _controlnet_sizes_of(config: SanaConfig) -> Sizes:
    return {name: getattr(config, name) for name in ("depth", "hidden_size", "mlp_ratio", "qk_norm")}


def _dc_ae_sizes(shapes: Shapes, path: object) -> Sizes:
    sizes: Sizes = {"latent_channels": _shape(shapes, "decoder.project_in.main.conv.weight", path)[1]}
    stages = 1 + max(int(match.group(1)) for key in shapes if (match := re.match(r"encoder\.stages\.(\d+)\.", key)))
    for side in ("encoder", "decoder"):
        found = [_stage_sizes(shapes, f"{side}.stages.{stage}.op_list.") for stage in range(stages)]
        for name in ("channels", "depths", "attention"):
            sizes[f"{side}_{name}"] = tuple(stage[name] for stage in found)
        if side == "decoder":
            sizes["decoder_batch_norm"] = tuple(stage["batch_norm"] for stage in found)
    sizes["multiscale"] = any(".aggreg." in key for key in shapes)
    resamplers = {key: shape for key, shape in shapes.items() if key.endswith(".main.conv.conv.weight")}
    unshuffle = any(key.startswith("encoder.") for key in resamplers)
    sizes["downsample"] = "pixel_unshuffle" if unshuffle else "conv"
    ups = [shape for key, shape in resamplers.items() if key.startswith("decoder.")]
    # Before its depth-to-space a convolution goes to four times the next width; an interpolating one never widens.
    sizes["upsample"] = "pixel_shuffle" if any(shape[0] > shape[1] for shape in ups) else "interpolate"
    return sizes


def _stage_sizes(shapes: Shapes, prefix: str) -> Sizes:
    """Width, depth and kind of the blocks below the prefix; an empty stage has neither width nor kind."""
    own = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    attention = [shape for key, shape in own.items() if key.endswith(".context_module.main.qkv.conv.weight")]
    residual = [shape for key, shape in own.items() if key.endswith(".main.conv1.conv.weight")]
    blocks = attention + residual
    return {
        "channels": blocks[0][1] if blocks else None,
        "depths": len(blocks),
        "attention": bool(attention) if blocks else None,
        "batch_norm": any(key.endswith(".running_mean") for key in own) if blocks else None,
    }


def _dc_ae_sizes_of(config: DCAEConfig) -> Sizes:
    sizes: Sizes = {name: getattr(config, name) for name in ("latent_channels", "multiscale", "downsample", "upsample")}
    for side in ("encoder", "decoder"):
        depths = getattr(config, f"{side}_depths")
        sizes[f"{side}_depths"] = depths
        for name in ("channels", "attention", "batch_norm"):
            values = getattr(config, f"{side}_{name}", None)
            if values is not None:
                sizes[f"{side}_{name}"] = tuple(
                    value if depth else None for value, depth in zip(values, depths, strict=True)
                )
    return sizes


_TRANSFORMER = Kind("transformer", SanaConfig, TRANSFORMERS, _transformer_sizes_of, transformer_from_diffusers)
_CONTROLNET = Kind("ControlNet", SanaConfig, CONTROLNETS, _controlnet_sizes_of, controlnet_from_diffusers)
_DC_AE = Kind("autoencoder", DCAEConfig, AUTOENCODERS, _dc_ae_sizes_of, dc_ae_from_diffusers)


def _resolve(
    kind: Kind,
    sizes: Sizes,
    state_dict: StateDict,
    variant: str | None,
    metadata: dict[str, str] | None,
    config_json: dict | None,
    path: Path,
    grid: int | None,
) -> tuple[SanaConfig | DCAEConfig, str]:
    """The configuration and the reason, from the first source that tells it."""
    fitting = [name for name, preset in kind.presets.items() if kind.sizes(preset) == sizes]
    if variant:
        return _from_variant(kind, sizes, variant, fitting, grid, path), f"{variant}, as asked for"
    embedded = _embedded(kind, state_dict, metadata, path)
    if embedded is not None:
        _check(kind, sizes, embedded, f"its {CONFIG_KEY}", path)
    stated = _stated(kind, config_json, path)
    if stated is not None:
        named = _by_name(fitting, path)
        config = _complete(kind, stated, [embedded, *(kind.presets[name] for name in [*named, *fitting])])
        _check(kind, sizes, config, "the config.json beside it", path)
        return config, f"{_preset_name(kind, config, named)}, by config.json"
    if embedded is not None:
        return embedded, f"{_preset_name(kind, embedded)}, by its own {CONFIG_KEY}"
    return _from_presets(kind, sizes, fitting, grid, path)


def _from_variant(kind: Kind, sizes: Sizes, variant: str, fitting: list[str], grid: int | None, path: Path):
    if variant not in kind.presets:
        raise CheckpointError(f"There is no {kind.noun} variant {variant!r}. Choose one of: {', '.join(kind.presets)}.")
    config = kind.presets[variant]
    _check(kind, sizes, config, f"the variant {variant}", path, fitting)
    of_grid = _of_grid(kind, fitting, grid)
    if of_grid and all(_position_embedding(kind.presets[name]) != _position_embedding(config) for name in of_grid):
        raise CheckpointError(
            f"{path} holds a position embedding of {grid} x {grid}, which the variant {variant} does not have. "
            f"Choose one of: {', '.join(of_grid)}."
        )
    return config


def _position_embedding(config: SanaConfig) -> tuple[int | None, float]:
    return config.pos_embed_base, config.pos_embed_interpolation


def _check(kind: Kind, sizes: Sizes, config: object, source: str, path: Path, fitting: list[str] | None = None) -> None:
    expected = kind.sizes(config)
    differing = [name for name in expected if expected[name] != sizes[name]]
    if differing:
        found = ", ".join(f"{name} {sizes[name]}" for name in differing)
        claimed = ", ".join(f"{name} {expected[name]}" for name in differing)
        remedy = (
            f"Choose one of: {', '.join(fitting)}."
            if fitting
            else "That belongs to another model: remove it, or set variant."
        )
        raise CheckpointError(f"{path} has {found}, but {source} says {claimed}. {remedy}")


def _embedded(kind: Kind, state_dict: StateDict, metadata: dict[str, str] | None, path: Path):
    content = (metadata or {}).get(CONFIG_KEY)
    content = state_dict.get(CONFIG_KEY) if content is None else content
    return None if content is None else parse_config(content, kind.config, path)


def _stated(kind: Kind, config_json: dict | None, path: Path) -> dict | None:
    try:
        return kind.from_diffusers(config_json) if config_json else None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the config.json beside it is incomplete or damaged ({error!r}).") from error


def _complete(kind: Kind, stated: dict, bases: list):
    """The stated fields on the first base that agrees with them, which adds the sampling defaults."""
    agreeing = (base for base in bases if base is not None and replace(base, **stated) == base)
    base = next(agreeing, None)
    return kind.config(**stated) if base is None else base


def _from_presets(kind: Kind, sizes: Sizes, fitting: list[str], grid: int | None, path: Path):
    if not fitting:
        found = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise CheckpointError(
            f"{path}: no published {kind.noun} has these sizes ({found}), and neither config.json nor the file itself "
            f"states the rest. Put the model's config.json beside it. Known: {', '.join(kind.presets)}."
        )
    candidates = _of_grid(kind, fitting, grid) or fitting
    named = _by_name(candidates, path)
    if named:
        return kind.presets[named[0]], f"{named[0]}, by its shapes and name"
    default = _default(kind, candidates)
    if default is None:
        raise CheckpointError(
            f"{path}: its shapes fit {' and '.join(candidates)}, which differ in what no shape tells. "
            "Choose one of them as variant, or give the file its name."
        )
    chosen = kind.presets[default]
    others = [name for name in candidates if _matters(kind.presets[name]) != _matters(chosen)]
    return chosen, f"{default}, by its shapes{_doubt(others)}"


def _of_grid(kind: Kind, names: list[str], grid: int | None) -> list[str]:
    """Those trained at the size for which the official file's position embedding was made."""
    return [name for name in names if grid and kind.presets[name].image_size == grid * PIXELS_PER_LATENT]


def _doubt(others: list[str]) -> str:
    if not others:
        return ""
    return (
        f"; {', '.join(others)} have the same, and neither config.json nor the name tells which it is: "
        "if it is one of these, set variant"
    )


def _matters(config: SanaConfig | DCAEConfig) -> tuple:
    """What changes the picture, leaving out the dtype that is only advised."""
    return tuple(value for name, value in asdict(config).items() if name != "dtype")


def _default(kind: Kind, candidates: list[str]) -> str | None:
    """The preset to take for these shapes; None if a wrong guess would spoil every picture.

    For transformers that is the plain 1024 px model: the 512 px one differs only in the size it was trained for, and
    the 2K, 4K and Sprint-teacher weights are rare and carry their name.
    """
    if kind is _DC_AE:
        return candidates[0] if len({kind.presets[name] for name in candidates}) == 1 else None
    plain = [
        name
        for name in candidates
        if kind.presets[name].pos_embed_base is None and kind.presets[name].timestep_scale == 1.0
    ]
    return next((name for name in plain if kind.presets[name].image_size == 1024), (plain or candidates)[0])


def _by_name(names: list[str], path: Path) -> list[str]:
    """The presets that the file's or its folders' names mention, the longest (most exact) first."""
    for part in reversed(path.parts[-5:]):
        mentioned = [name for name in names if _plain(name) in _plain(part)]
        if mentioned:
            return sorted(mentioned, key=len, reverse=True)
    return []


def _plain(name: str) -> str:
    return re.sub(r"[-. ]", "_", name.lower())


def _preset_name(kind: Kind, config: object, preferred: list[str] = ()) -> str:
    names = [*preferred, *kind.presets]
    return next((name for name in names if kind.presets[name] == config), f"an unpublished {kind.noun}")
