"""What one training step is computed from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures of one size with their captions.

    latents: [B, C, h, w] float32, scaled to unit deviation.
    embeds: [B, L, C] float32 text features, L the longest caption of the batch; zeros behind shorter ones.
    mask: [B, L] bool, True = attend.
    names: paths of the pictures, for messages.
    """

    latents: Tensor
    embeds: Tensor
    mask: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch there."""
        moved = (part.to(device, non_blocking=True) for part in (self.latents, self.embeds, self.mask))
        return Batch(*moved, self.names)
