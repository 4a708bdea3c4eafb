"""The captions of a batch, as text features."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Captions:
    """What the transformer attends to: text features [B, L, C] and their mask [B, L], 1 = attend."""

    embeds: Tensor
    mask: Tensor

    def padded(self, length: int) -> "Captions":
        """The same captions with unattended positions up to `length`."""
        rows = length - self.mask.shape[1]
        return Captions(pad(self.embeds, (0, 0, 0, rows)), pad(self.mask, (0, rows)))


def join_captions(uncond: Captions, cond: Captions) -> Captions:
    """One batch of both, in the order that guidance expects."""
    length = max(uncond.mask.shape[1], cond.mask.shape[1])
    uncond, cond = uncond.padded(length), cond.padded(length)
    embeds = torch.cat([uncond.embeds.to(cond.embeds), cond.embeds])
    return Captions(embeds, torch.cat([uncond.mask.to(cond.mask), cond.mask]))
