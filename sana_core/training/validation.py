"""The loss on fixed pictures, noise levels and noise: a number that only the weights change."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .batch import Batch
from .loss import draw_normal, flow_matching_errors, sample_generators

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Sequence[Batch], *, sigmas: Sequence[float] = SIGMAS, seed: int = 0
) -> dict[str, float]:
    """Mean loss at each noise level and over all, float32 names as `validation_loss` and `validation_loss_0.5`.

    Args:
        model: predicts the velocity; no caption is dropped.
        batches: the pictures, the same at each call.
        sigmas: noise levels, as the model sees them, after the shift.
    """
    device = next(model.parameters()).device
    losses: dict[float, list[Tensor]] = {sigma: [] for sigma in sigmas}
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        noise = draw_normal(batch.latents.shape[1:], sample_generators(seed, number, range(len(batch.names))))

        def velocity(x_t: Tensor, timestep: Tensor, batch: Batch = batch) -> Tensor:
            return model(x_t, timestep, batch.embeds, batch.mask)

        for sigma in sigmas:
            level = torch.full((len(batch.names),), sigma)
            losses[sigma].append(flow_matching_errors(velocity, batch.latents, noise.to(device), level))
    means = {sigma: torch.cat(parts).mean().item() for sigma, parts in losses.items()}
    return {
        "validation_loss": sum(means.values()) / len(means),
        **{f"validation_loss_{sigma:g}": mean for sigma, mean in means.items()},
    }
