"""The sizes of a model as JSON: our own (every field of the dataclass) and diffusers' config.json."""

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..config import AUTOENCODERS, DCAEConfig, SanaConfig
from .files import CheckpointError

logger = logging.getLogger(__name__)

CONFIG_KEY = "sana_config"  # in the metadata of a safetensors file, or a uint8 tensor where a writer drops metadata
QK_NORM = "rms_norm_across_heads"  # diffusers' word for q/k norm over all channels
PIXELS_PER_LATENT = 32  # of the autoencoder that every published transformer was trained with

Config = TypeVar("Config", SanaConfig, DCAEConfig)


def dump_config(config: SanaConfig | DCAEConfig) -> str:
    """The configuration as JSON."""
    return json.dumps(asdict(config))


def config_tensor(config: SanaConfig | DCAEConfig) -> Tensor:
    """The same JSON as a uint8 tensor, for state dicts whose writer drops metadata."""
    return torch.tensor(list(dump_config(config).encode()), dtype=torch.uint8)


def parse_config(content: str | Tensor, kind: type[Config], path: object) -> Config:
    """The configuration that `dump_config` or `config_tensor` wrote.

    Fields of a newer version are left out with a warning. Raises CheckpointError for anything else than a `kind`.
    """
    if isinstance(content, Tensor):  # may have been cast with the weights; all byte values survive even in bfloat16
        content = bytes(content.to(torch.uint8).tolist()).decode("utf-8", errors="replace")
    try:
        values = json.loads(content)
        known = {field.name for field in fields(kind)}
        unknown = sorted(values.keys() - known)
        if unknown:
            logger.warning("%s: unknown entries in %s were left out: %s", path, CONFIG_KEY, ", ".join(unknown))
        return kind(**{name: _frozen(value) for name, value in values.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its {CONFIG_KEY} is not a {kind.__name__} ({error}).") from error


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def transformer_to_diffusers(config: SanaConfig) -> dict:
    """config.json for diffusers' SanaTransformer2DModel."""
    base = config.pos_embed_base
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.hidden_size // config.head_dim,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.num_cross_heads,
        "cross_attention_head_dim": config.hidden_size // config.num_cross_heads,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.caption_channels,
        "mlp_ratio": config.mlp_ratio,
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": config.image_size // PIXELS_PER_LATENT if base is None else base,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None if base is None else config.pos_embed_interpolation,
        "guidance_embeds": config.guidance_embed,
        "guidance_embeds_scale": 0.1,
        "qk_norm": QK_NORM if config.qk_norm else None,
        "timestep_scale": config.timestep_scale,
    }


def transformer_from_diffusers(content: dict, class_name: str = "SanaTransformer2DModel") -> dict | None:
    """Fields of SanaConfig that the config.json of a model of that class states; None for another class's.

    Entries that are absent have diffusers' defaults.
    """
    if content.get("_class_name") != class_name:
        return None
    if content.get("patch_size", 1) != 1 or content.get("attention_bias", False):
        raise CheckpointError("config.json asks for a patch_size other than 1 or for attention_bias; no Sana has them.")
    head_dim = content.get("attention_head_dim", 32)
    sample_size = content.get("sample_size", 32)
    interpolation = content.get("interpolation_scale")
    values = {
        "depth": content.get("num_layers", 20),
        "hidden_size": content.get("num_attention_heads", 70) * head_dim,
        "num_cross_heads": content.get("num_cross_attention_heads", 20),
        "caption_channels": content.get("caption_channels", 2304),
        "in_channels": content.get("in_channels", 32),
        "head_dim": head_dim,
        "mlp_ratio": content.get("mlp_ratio", 2.5),
        "qk_norm": content.get("qk_norm") is not None,
        "guidance_embed": content.get("guidance_embeds", False),
        "timestep_scale": content.get("timestep_scale", 1.0),
        "image_size": sample_size * PIXELS_PER_LATENT,
        "pos_embed_base": None if interpolation is None else sample_size,
    }
    return values if interpolation is None else values | {"pos_embed_interpolation": float(interpolation)}


def controlnet_from_diffusers(content: dict) -> dict | None:
    """The same of a SanaControlNetModel's config.json, whose layers are the copied blocks."""
    return transformer_from_diffusers(content, "SanaControlNetModel")


def dc_ae_to_diffusers(config: DCAEConfig) -> dict:
    """config.json for diffusers' AutoencoderDC."""
    sides = {}
    for side in ("encoder", "decoder"):
        attention = getattr(config, f"{side}_attention")
        sides |= {
            f"{side}_block_types": ["EfficientViTBlock" if stage else "ResBlock" for stage in attention],
            f"{side}_block_out_channels": list(getattr(config, f"{side}_channels")),
            f"{side}_layers_per_block": list(getattr(config, f"{side}_depths")),
            f"{side}_qkv_multiscales": [[5] if stage and config.multiscale else [] for stage in attention],
        }
    return {
        "_class_name": "AutoencoderDC",
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": 32,
        **sides,
        "downsample_block_type": "Conv" if config.downsample == "conv" else config.downsample,
        "upsample_block_type": config.upsample,
        "decoder_norm_types": ["batch_norm" if stage else "rms_norm" for stage in config.decoder_batch_norm],
        "decoder_act_fns": ["relu" if stage else "silu" for stage in config.decoder_batch_norm],
        "decoder_conv_act_fn": config.decoder_out_act,
        "scaling_factor": config.scaling_factor,
    }


def dc_ae_from_diffusers(content: dict) -> dict | None:
    """Fields of DCAEConfig that an AutoencoderDC's config.json states; None for another class's.

    The authors' own repositories have a config.json that just names the model.
    """
    if content.get("model_name") in AUTOENCODERS:
        return asdict(AUTOENCODERS[content["model_name"]])
    if content.get("_class_name") != "AutoencoderDC":
        return None
    values = {}
    for side in ("encoder", "decoder"):
        channels = tuple(content[f"{side}_block_out_channels"])
        kinds = _per_stage(content[f"{side}_block_types"], len(channels))
        values |= {
            f"{side}_channels": channels,
            f"{side}_depths": tuple(content[f"{side}_layers_per_block"]),
            f"{side}_attention": tuple(kind == "EfficientViTBlock" for kind in kinds),
        }
    multiscales = [*content["encoder_qkv_multiscales"], *content["decoder_qkv_multiscales"]]
    norms = _per_stage(content.get("decoder_norm_types", "rms_norm"), len(values["decoder_channels"]))
    unshuffle = content.get("downsample_block_type", "pixel_unshuffle") == "pixel_unshuffle"
    return values | {
        "latent_channels": content.get("latent_channels", 32),
        "multiscale": any(multiscales),
        "downsample": "pixel_unshuffle" if unshuffle else "conv",
        "upsample": content.get("upsample_block_type", "pixel_shuffle"),
        "decoder_batch_norm": tuple(norm == "batch_norm" for norm in norms),
        "decoder_out_act": content.get("decoder_conv_act_fn", "relu"),
        "scaling_factor": content.get("scaling_factor", 1.0),
    }


def _per_stage(value: str | list[str], stages: int) -> list[str]:
    """Diffusers writes one word where all stages agree."""
    return [value] * stages if isinstance(value, str) else value


def read_shift(folder: Path) -> float | None:
    """The shift that a diffusers folder was published with, under the name that its scheduler gives it."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return config.get("flow_shift", config.get("shift"))
