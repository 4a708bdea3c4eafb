"""Training a LoRA (arXiv:2106.09685): adapters beside frozen layers, and the files that other programs read.

The fused qkv and kv layers get an adapter for each of q, k and v, as in diffusers, where these are layers of their own.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.files import write_safetensors
from ..checkpoint.keys import TRANSFORMER_RULES, diffusers_names
from ..checkpoint.lora import METADATA_KEY
from ..models.sana import SanaTransformer

_ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
TARGETS = {
    "attention": _ATTENTION,
    # not the depthwise convolution, which no LoRA format of diffusers has a place for
    "attention+feed-forward": (*_ATTENTION, "mlp.inverted_conv.conv", "mlp.point_conv.conv"),
}


class AdaptedLayer(nn.Module):
    """A frozen linear layer or 1x1 convolution, and low-rank additions to equal parts of its outputs."""

    def __init__(self, base: nn.Linear | nn.Conv2d, parts: int, rank: int, scale: float, generator: torch.Generator):
        """The additions are zero at first: `down` is random as a linear layer's weights are, `up` is zero."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        weight = base.weight
        kernel = weight.shape[2:]  # () or (1, 1)
        bound = 1 / math.sqrt(weight.shape[1])
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for _ in range(parts):
            down = torch.empty(rank, weight.shape[1], *kernel).uniform_(-bound, bound, generator=generator)
            self.down.append(nn.Parameter(down.to(weight.device)))
            self.up.append(nn.Parameter(torch.zeros(weight.shape[0] // parts, rank, *kernel, device=weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down[0].dtype)
        # All parts at once: the same sums with zeros in them, in two thin products instead of two for each part.
        # The model's 1x1 convolutions, too, are called with tokens, channels last.
        down = torch.cat([part.flatten(1) for part in self.down])
        up = self.scale * torch.block_diag(*(part.flatten(1) for part in self.up))
        return out + F.linear(F.linear(x, down), up).to(out.dtype)


def add_adapters(
    model: SanaTransformer, rank: int, *, alpha: float | None = None, targets: str = "attention", seed: int = 0
) -> None:
    """Freezes the model and puts float32 adapters into each of its blocks, in place.

    Args:
        model: in any precision that torch computes in.
        rank: of each adapter.
        alpha: the additions are scaled by alpha / rank; None: by 1.
        targets: a name of TARGETS.

    Raises:
        ValueError: rank, alpha or targets are not possible, or the model has adapters already.
    """
    alpha = rank if alpha is None else alpha
    if rank < 1 or alpha <= 0:
        raise ValueError(f"A LoRA of rank {rank} with alpha {alpha}: expected a rank of 1 or more, alpha above 0.")
    if targets not in TARGETS:
        raise ValueError(f"The LoRA targets {targets!r} are unknown, expected one of {', '.join(TARGETS)}.")
    if any(_adapted(model)):
        raise ValueError("The model has LoRA adapters already; load it again to train another LoRA.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(model.blocks):
        for target in TARGETS[targets]:
            parts = len(diffusers_names(f"blocks.{index}.{target}.weight", TRANSFORMER_RULES))
            layer = AdaptedLayer(block.get_submodule(target), parts, rank, alpha / rank, generator)
            block.set_submodule(target, layer)


def _adapted(model: SanaTransformer) -> Iterator[tuple[str, AdaptedLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))


def save_lora(model: SanaTransformer, path: str | Path, *, base_model: str, step: int) -> None:
    """Writes the adapters as diffusers' `load_lora_weights` reads them, float32, at once or not at all.

    Args:
        model: with adapters.
        path: of a .safetensors file.
        base_model: name of the model that the LoRA was trained on.
        step: how many steps it was trained.

    Raises:
        ValueError: the model has no adapters.
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers = dict(_require_adapters(model))
    for name, layer in layers.items():
        stems = (key.removesuffix(".weight") for key in diffusers_names(f"{name}.weight", TRANSFORMER_RULES))
        for stem, down, up in zip(stems, layer.down, layer.up, strict=True):
            tensors[f"transformer.{stem}.lora_A.weight"] = down
            tensors[f"transformer.{stem}.lora_B.weight"] = up
    first = next(iter(layers.values()))
    rank = len(first.down[0])
    modules = sorted({key.split(".", 3)[3].rsplit(".", 2)[0] for key in tensors})
    adapter = {"r": rank, "lora_alpha": first.scale * rank, "target_modules": modules}
    metadata = {
        METADATA_KEY: json.dumps({f"transformer.{name}": value for name, value in adapter.items()}),
        "modelspec.architecture": "sana/lora",
        "base_model": base_model,
        "rank": str(rank),
        "step": str(step),
    }
    write_safetensors(tensors, path, metadata)


def comfy_lora(model: SanaTransformer) -> dict[str, Tensor]:
    """The adapters as ComfyUI's LORA_MODEL: keys of the official weights, with q, k and v in one, float32 on the CPU.

    The parts of a fused layer become one LoRA of their added ranks: `down` one below the other, `up` block-diagonal.
    Raises ValueError where the model has no adapters.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in _require_adapters(model):
        down = torch.cat([part.detach() for part in layer.down])
        up = torch.block_diag(*(part.detach().flatten(1) for part in layer.up))
        stem = f"diffusion_model.{name}"
        tensors[f"{stem}.lora_down.weight"] = down.cpu()
        tensors[f"{stem}.lora_up.weight"] = up.view(*up.shape, *down.shape[2:]).cpu()
        tensors[f"{stem}.alpha"] = torch.tensor(layer.scale * len(down))
    return tensors


def _require_adapters(model: SanaTransformer) -> list[tuple[str, AdaptedLayer]]:
    layers = list(_adapted(model))
    if not layers:
        raise ValueError("The model has no LoRA adapters; put them in with add_adapters before training.")
    return layers
