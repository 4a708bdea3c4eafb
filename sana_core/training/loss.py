"""The flow-matching objective of Sana (NVlabs/Sana `diffusion/model/gaussian_diffusion.py`, `respace.py`)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batch import Batch

NUM_TIMESTEPS = 1000
CAPTION_DROPOUT = 0.1


def sample_generators(seed: int, step: int, positions: Sequence[int]) -> list[torch.Generator]:
    """The randomness of each sample of a step, on the CPU.

    It depends on the sample's position among all samples of the step, and not on how ranks and accumulation share
    these: so a large batch, its parts one after the other, and its parts on several devices draw the same.
    """
    generators = []
    for position in positions:
        digest = hashlib.blake2b(f"{seed} {step} {position}".encode(), digest_size=7).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return generators


def draw_normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal [B, *shape], one row of each generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform [B] in [0, 1), one of each generator."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators])


def sigmas_of(normal: Tensor, shift: float) -> Tensor:
    """Noise levels to train on: logit-normal on the grid 0, 0.001 ... 0.999, and only then shifted.

    Args:
        normal: standard normal numbers.
        shift: of the flow schedule; larger means more noise.

    Returns:
        Values in [0, 1), of the same shape.
    """
    base = (normal.sigmoid() * NUM_TIMESTEPS).floor() / NUM_TIMESTEPS
    return shift * base / (1 + (shift - 1) * base)


def flow_matching_errors(velocity_model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, sigma: Tensor):
    """Mean squared error of the velocity noise - x0 for each sample, without weights.

    Args:
        velocity_model: maps x_t [B, C, h, w] and the timestep [B], the truncated 1000 * sigma, to a velocity.
        x0: scaled latents [B, C, h, w].
        noise: standard normal, shape of x0.
        sigma: [B] in [0, 1).

    Returns:
        [B], of x0's dtype.
    """
    sigma = sigma.to(x0)
    level = sigma[:, None, None, None]
    x_t = (1 - level) * x0 + level * noise
    velocity = velocity_model(x_t, timesteps_of(sigma)).to(x0.dtype)
    return (velocity - (noise - x0)).square().mean((1, 2, 3))


def timesteps_of(sigma: Tensor) -> Tensor:
    """The whole timesteps [B], 0 to 999, that the official model is told of the noise levels [B]."""
    return (sigma * NUM_TIMESTEPS).floor()


def drop_captions(
    embeds: Tensor, mask: Tensor, null_embeds: Tensor, null_mask: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces the dropped captions by the null caption and its mask, as unguided sampling will.

    Args:
        embeds, mask: [B, L, C] and [B, L].
        null_embeds, null_mask: [L, C] and [L], of the empty prompt.
        dropped: [B] bool.
    """
    return (
        torch.where(dropped[:, None, None], null_embeds, embeds),
        torch.where(dropped[:, None], null_mask, mask),
    )


class Objective:
    """What a run minimises."""

    def __call__(self, model: nn.Module, batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Mean of the batch's losses, a scalar; all randomness comes from the generators, one to a sample."""
        raise NotImplementedError

    def describe(self, batch, generators: Sequence[torch.Generator]) -> str:
        """What made this loss, for the message about one that is not finite."""
        return ", ".join(batch.names)


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Sana's objective on a Batch of latents and captions."""

    shift: float  # of the flow schedule; the model's own is `SanaConfig.shift`
    null_embeds: Tensor  # [L, C] features of the empty prompt, without the instruction
    caption_dropout: float = CAPTION_DROPOUT
    keep_caption_mask: bool = False  # as official training: a dropped caption's own mask stays
    recompute: bool = False  # gradient checkpointing

    def __post_init__(self):
        if self.shift <= 0 or not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"shift is {self.shift}, expected a number above 0; caption dropout is {self.caption_dropout}, "
                "expected 0 to 1."
            )

    def __call__(self, model: nn.Module, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Scalar float32. Raises ValueError where the null caption is too short for a mask that is kept."""
        sigma, dropped, noise = (part.to(batch.latents.device) for part in self._draw(batch, generators))
        embeds, mask = self._captions(batch, dropped)

        def velocity(x_t: Tensor, timestep: Tensor) -> Tensor:
            return model(x_t, timestep, embeds, mask, recompute=self.recompute)

        return flow_matching_errors(velocity, batch.latents, noise, sigma).mean()

    def describe(self, batch: Batch, generators: Sequence[torch.Generator]) -> str:
        """The pictures, each with the timestep that its noise had."""
        timesteps = timesteps_of(self._draw(batch, generators)[0])
        return ", ".join(f"{name} (t {int(t)})" for name, t in zip(batch.names, timesteps, strict=True))

    def _draw(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        sigma = sigmas_of(draw_normal((), generators), self.shift)
        dropped = draw_uniform(generators) < self.caption_dropout
        return sigma, dropped, draw_normal(batch.latents.shape[1:], generators)

    def _captions(self, batch: Batch, dropped: Tensor) -> tuple[Tensor, Tensor]:
        null, length = self.null_embeds.to(batch.embeds), batch.embeds.shape[1]
        if self.keep_caption_mask:
            if len(null) < length:
                raise ValueError(
                    f"The null caption has {len(null)} tokens and a caption {length}: to keep the captions' masks it "
                    "must be padded to the longest, as in official training (300 tokens)."
                )
            return drop_captions(batch.embeds, batch.mask, null[:length], batch.mask, dropped)
        longest = max(len(null), length)
        null_mask = torch.arange(longest, device=null.device) < len(null)
        return drop_captions(
            nn.functional.pad(batch.embeds, (0, 0, 0, longest - length)),
            nn.functional.pad(batch.mask, (0, longest - length)),
            nn.functional.pad(null, (0, 0, 0, longest - len(null))),
            null_mask,
            dropped,
        )
