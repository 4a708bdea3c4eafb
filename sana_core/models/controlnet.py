"""ControlNet for Sana: copies of the transformer's first blocks, which add what a control picture asks for.

Attribute names are the keys of the published checkpoints. Source: NVlabs/Sana `sana_multi_scale_controlnet.py`.
diffusers wires the same weights otherwise: its branch begins before the base's first block instead of behind it, and
its residuals are added one block later. Here the authors' wiring holds, with which the weights were trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import SanaConfig
from ..kernels import REFERENCE, Kernels
from .layers import KeysValues, SanaBlock


class ControlBlock(nn.Module):
    """A copy of one block of the transformer, and the projection of its result to what is added."""

    def __init__(self, config: SanaConfig, operations, kernels: Kernels, *, first: bool, **factory):
        super().__init__()
        size = config.hidden_size
        self.copied_block = SanaBlock(config, operations, kernels, **factory)
        if first:
            self.before_proj = operations.Linear(size, size, **factory)
        self.after_proj = operations.Linear(size, size, **factory)


class SanaControlNet(nn.Module):
    """The branch. It has no embedders of its own: it runs within the transformer's forward pass, on its inputs."""

    def __init__(
        self,
        config: SanaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        operations=nn,
        kernels: Kernels = REFERENCE,
    ):
        """Builds the branch.

        Args:
            config: that of the transformer, with the count of copied blocks for its depth.
            operations, kernels: as for SanaTransformer.
        """
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.controlnet = nn.ModuleList(
            ControlBlock(config, operations, kernels, first=index == 0, **factory) for index in range(config.depth)
        )

    def check_model(self, config: SanaConfig) -> None:
        """Raises ValueError if this is not for transformers of that configuration."""
        own = self.config
        if own.hidden_size != config.hidden_size or own.depth >= config.depth:
            raise ValueError(
                f"The ControlNet is {own.hidden_size} wide and controls the first {own.depth + 1} blocks; this model "
                f"is {config.hidden_size} wide and has {config.depth}. Use the ControlNet that was made for the "
                "model: 1152 is 0.6B, 2240 is 1.6B."
            )

    def prepare_context(self, context: Tensor) -> tuple[KeysValues, ...]:
        """What all steps of a prompt share, of its embedded caption [B, L, C]."""
        return tuple(block.copied_block.cross_attn.keys_values(context) for block in self.controlnet)

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        keys_values: tuple[KeysValues, ...],
        mask: Tensor | None,
        t0: Tensor,
        height: int,
        width: int,
    ) -> Iterator[Tensor]:
        """Runs the branch, one block at a time, so that one residual is in memory.

        Args:
            x: [B, N, C] tokens behind the transformer's first block.
            hint: [B or 1, N, C] tokens of the control picture, from the transformer's embedder.
            keys_values: of `prepare_context`; mask: [B, L] bool, or None.
            t0: [B, 6C], from the timestep.
            height, width: of the latent; N = height * width.

        Yields:
            The residuals [B, N, C], in front of the transformer's second block first.
        """
        x = x + self.controlnet[0].before_proj(hint)
        for block, prepared in zip(self.controlnet, keys_values, strict=True):
            x = block.copied_block(x, prepared, mask, t0, height, width)
            yield block.after_proj(x)


@dataclass(frozen=True)
class Control:
    """A branch at work: what it shall follow, and how strictly."""

    net: SanaControlNet
    hint: Tensor  # [1 or B, in_channels, h, w], the control picture as a scaled latent
    strength: float = 1.0  # of the residuals; 0 is no control

    def check(self, config: SanaConfig, shape: torch.Size) -> None:
        """Raises ValueError if the branch is not for this transformer, or the hint not for latents of this shape."""
        self.net.check_model(config)
        if self.hint.shape[1:] != shape[1:] or len(self.hint) not in (1, shape[0]):
            raise ValueError(
                f"The control latent has shape {tuple(self.hint.shape)}, expected {(shape[0], *shape[1:])}, or 1 for "
                "all of the batch. Encode the control picture at the size that is drawn."
            )

    def residuals(
        self,
        embed: Callable[[Tensor], Tensor],
        x: Tensor,
        keys_values: tuple[KeysValues, ...],
        mask: Tensor | None,
        t0: Tensor,
        *size: int,
    ) -> Iterator[Tensor]:
        """What to add in front of each of the transformer's blocks from the second on.

        `embed`: its embedder of latents. The others are those of `SanaControlNet.forward`.
        """
        hint = embed(self.hint.to(x))
        if len(hint) > 1:
            hint = repeat_last(hint, len(x))
        for residual in self.net(x, hint, keys_values, mask, t0, *size):
            yield self.strength * residual


def repeat_last(rows: Tensor, count: int) -> Tensor:
    """`count` rows, at most twice those given: these, then the last of them again.

    So guidance puts its two halves, and perturbed attention its copies, behind the rows of a batch.
    """
    missing = count - len(rows)
    return torch.cat([rows, rows[-missing:]]) if missing else rows
