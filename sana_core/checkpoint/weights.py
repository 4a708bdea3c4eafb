"""From files to models and back. A model is built on the meta device and takes over the file's tensors."""

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import DCAEConfig, SanaConfig
from ..kernels import Kernels, best_kernels
from ..models.controlnet import SanaControlNet
from ..models.dc_ae import DCAE
from ..models.sana import SanaTransformer
from .configuration import CONFIG_KEY, dc_ae_to_diffusers, dump_config, transformer_to_diffusers
from .detection import detect_controlnet, detect_dc_ae, detect_transformer
from .families import CONTROLNET_ANCHORS, DC_AE_ANCHORS, TRANSFORMER_ANCHORS, describe_keys, strip_prefix
from .files import CheckpointError, Source, StateDict, locate_weights, read_files, write_json, write_safetensors
from .keys import (
    dc_ae_rules,
    iterate_controlnet,
    iterate_dc_ae,
    iterate_transformer,
    official_to_diffusers,
    transformer_rules,
)
from .quantization import dequantize, with_formats

logger = logging.getLogger(__name__)

WIDE_DTYPES = (torch.float32, torch.bfloat16)  # with the range that DC-AE and Gemma-2 need
FLOAT8_DTYPES = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def read_transformer(
    path: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None, keep_quantized: bool = False
) -> tuple[SanaConfig, StateDict]:
    """Configuration and weights, under the official keys, of a file or folder in any layout.

    Args:
        path: .pth or .safetensors file, diffusers folder of the model or of a pipeline, folder of the official
            repository.
        variant: a preset's name, for what shapes cannot tell.
        dtype: to cast the weights to, and of which to read the files where a folder has several precisions.
        keep_quantized: leave the linear layers of an official file that has them in 8 bits with scales as they are,
            with their scales and formats beside the weights (see `quantization`); else they become bfloat16.

    Raises:
        CheckpointError: see `detect_transformer` and `quantization.dequantize`.
    """
    source = locate_weights(path, ("transformer", "checkpoints"), dtype)
    return _read(source, TRANSFORMER_ANCHORS, detect_transformer, iterate_transformer, variant, dtype, keep_quantized)


def _read(
    source: Source,
    anchors: dict[str, str],
    detect,
    iterate,
    variant: str | None,
    dtype: torch.dtype | None,
    keep_quantized: bool = False,
):
    state_dict, metadata = read_files(source.files)
    state_dict = strip_prefix(with_formats(state_dict, metadata), anchors.values())
    config, layout, reason = detect(
        state_dict, variant=variant, metadata=metadata, config_json=source.config, path=source.files[0]
    )
    logger.info("%s: %s (%s layout)", source.path, reason, layout)
    # Diffusers cuts fused layers, whose parts have scales of their own.
    dequantize(state_dict, source.path, keep_linear=keep_quantized and layout == "official")
    return config, {key: cast_weight(tensor, "cpu", dtype) for key, tensor in iterate(state_dict, layout)}


def cast_weight(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """Move the tensor, and cast it if it is of floating point: counters stay what they are."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def load_transformer(
    path: str | Path,
    *,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations=None,
    kernels: Kernels | None = None,
) -> SanaTransformer:
    """Load a Sana transformer, in eval mode.

    Args:
        path, variant: see `read_transformer`.
        dtype: of the weights; None keeps the file's.
        operations: where the layers come from; None is torch.nn.
        kernels: None is the best that run on the device.

    Raises:
        CheckpointError: another file, missing, extra or misshapen weights, or sizes that nothing tells.
    """
    config, state_dict = read_transformer(path, variant=variant, dtype=dtype)
    dtype = dtype or main_dtype(state_dict)
    if operations is None:
        _require_computable(dtype, path)
    kernels = kernels or best_kernels(device)
    model = SanaTransformer(config, device="meta", dtype=dtype, operations=operations or nn, kernels=kernels)
    return fill_model(model, state_dict, path, device, dtype)


def _require_computable(dtype: torch.dtype, path: str | Path) -> None:
    if dtype in FLOAT8_DTYPES:
        raise CheckpointError(
            f"{path} has {dtype} weights, in which torch.nn cannot compute. Pass dtype=torch.bfloat16."
        )


def read_controlnet(
    path: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> tuple[SanaConfig, StateDict]:
    """Configuration and weights of a ControlNet's branch, under the official keys. Arguments as `read_transformer`.

    The official file holds the base model as well, of which nothing is read.
    """
    source = locate_weights(path, ("controlnet", "checkpoints"), dtype)
    return _read(source, CONTROLNET_ANCHORS, detect_controlnet, iterate_controlnet, variant, dtype)


def load_controlnet(
    path: str | Path,
    *,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> SanaControlNet:
    """Load a ControlNet's branch, in eval mode. Arguments and errors as for `load_transformer`."""
    config, state_dict = read_controlnet(path, variant=variant, dtype=dtype)
    dtype = dtype or main_dtype(state_dict)
    _require_computable(dtype, path)
    model = SanaControlNet(config, device="meta", dtype=dtype, kernels=best_kernels(device))
    return fill_model(model, state_dict, path, device, dtype)


def read_dc_ae(
    path: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> tuple[DCAEConfig, StateDict]:
    """Configuration and weights, under the official keys, of an autoencoder. Arguments as for `read_transformer`."""
    return _read(locate_weights(path, ("vae",), dtype), DC_AE_ANCHORS, detect_dc_ae, iterate_dc_ae, variant, dtype)


def load_dc_ae(
    path: str | Path,
    *,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kernels: Kernels | None = None,
) -> DCAE:
    """Load a DC-AE, in eval mode. Arguments and errors as for `load_transformer`.

    Float16 overflows in the deep stages: weights stored in it, or asked for in it, become float32, and the log says so.
    """
    dtype = dtype and wide_dtype(dtype, torch.float32, "DC-AE", path)
    config, state_dict = read_dc_ae(path, variant=variant, dtype=dtype)
    dtype = dtype or wide_dtype(main_dtype(state_dict), torch.float32, "DC-AE", path)
    model = DCAE(config, device="meta", dtype=dtype, kernels=kernels or best_kernels(device))
    return fill_model(model, state_dict, path, device, dtype)


def wide_dtype(dtype: torch.dtype, instead: torch.dtype, noun: str, path: str | Path) -> torch.dtype:
    """`dtype` if the model keeps its range in it, else `instead`, with a line in the log."""
    if dtype in WIDE_DTYPES:
        return dtype
    logger.info("%s: %s overflows in %s, so it is loaded in %s", path, noun, dtype, instead)
    return instead


def main_dtype(state_dict: StateDict) -> torch.dtype:
    """Dtype of most of the floating-point weights; a model computes in one."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state_dict.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.get, default=torch.float32)


def fill_model(
    model: nn.Module,
    state_dict: StateDict,
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put the weights into a model on the meta device, cast and moved one by one; returns it in eval mode.

    Casts in `state_dict` itself, so that one copy is held. Raises CheckpointError unless keys and shapes agree
    exactly.
    """
    check_weights(state_dict, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}, path)
    for key in list(state_dict):
        state_dict[key] = cast_weight(state_dict.pop(key), device, dtype)
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval()


def check_weights(state_dict: StateDict, expected: dict[str, tuple[int, ...]], path: str | Path) -> None:
    """Raises CheckpointError, naming the first keys, unless these are the expected weights, all and only."""
    found = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    problems = [
        *_problem("missing", sorted(expected.keys() - found.keys())),
        *_problem("not expected", sorted(found.keys() - expected.keys())),
        *_problem(
            "of another shape",
            [
                f"{key} {list(found[key])} instead of {list(shape)}"
                for key, shape in sorted(expected.items())
                if found.get(key, shape) != shape
            ],
        ),
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit: {'; '.join(problems)}. By its keys, {describe_keys(found)}. "
            "Download the file again, or choose the loader and variant that it belongs to."
        )


def _problem(what: str, keys: list[str]) -> Iterable[str]:
    if keys:
        rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        yield f"{what}: {', '.join(itertools.islice(keys, 3))}{rest}"


def save_transformer(model: SanaTransformer, path: str | Path, *, layout: str = "official") -> None:
    """Write a transformer as safetensors, at once or not at all.

    Args:
        path: a .safetensors file; for "diffusers" also a folder, which then gets config.json and the weights.
        layout: "official" or "diffusers".

    Raises:
        CheckpointError: an unknown layout, or the file cannot be written.
    """
    _save(model, path, layout, transformer_rules, transformer_to_diffusers)


def save_controlnet(model: SanaControlNet, path: str | Path, *, layout: str = "official") -> None:
    """Write a ControlNet's branch as a .safetensors file under the official keys, at once or not at all.

    Raises CheckpointError for another layout or kind of file, or if it cannot be written.
    """
    path = Path(path)
    if layout != "official" or path.suffix not in (".safetensors", ".sft"):
        raise CheckpointError(
            f'{path} with layout {layout!r}: a ControlNet is written with layout "official" to a .safetensors file. '
            "Diffusers' layout would hold the base model's embedders too, which the branch has not."
        )
    write_safetensors(model.state_dict(), path, {CONFIG_KEY: dump_config(model.config)})


def save_dc_ae(model: DCAE, path: str | Path, *, layout: str = "official") -> None:
    """Write an autoencoder as safetensors. Arguments and errors as for `save_transformer`."""
    _save(model, path, layout, dc_ae_rules, dc_ae_to_diffusers)


def _save(model: nn.Module, path: str | Path, layout: str, rules, to_diffusers) -> None:
    path = Path(path)
    is_file = path.suffix in (".safetensors", ".sft")
    if layout not in ("official", "diffusers") or not (is_file or layout == "diffusers"):
        raise CheckpointError(
            f'{path} with layout {layout!r}: expected "official" with a .safetensors file, or "diffusers" with a '
            ".safetensors file or a folder."
        )
    state_dict = model.state_dict()
    if layout == "diffusers":
        state_dict = official_to_diffusers(state_dict, rules(state_dict))
    metadata = {CONFIG_KEY: dump_config(model.config)}
    write_safetensors(state_dict, path if is_file else path / DIFFUSERS_FILE, metadata)
    if not is_file:
        write_json(to_diffusers(model.config), path / "config.json")
