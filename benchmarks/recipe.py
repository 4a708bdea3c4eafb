"""Diffusers' DreamBooth LoRA recipe for Sana as one training step over its own transformer, and of all weights too.

Source: huggingface/diffusers `examples/dreambooth/train_dreambooth_lora_sana.py`. Its defaults are kept: LoRA of rank 4
on `to_q`, `to_k` and `to_v`, captions padded to 300 tokens, AdamW as PyTorch makes it, the gradient clipped at 1, the
loss without weights. Noise levels are drawn as `--weighting_scheme logit_normal` draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from torch import Tensor, nn

RANK = 4
LAYERS = ("to_q", "to_k", "to_v")
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
WEIGHTING = "logit_normal"


def add_lora(transformer: SanaTransformer2DModel, rank: int = RANK, layers: Sequence[str] = LAYERS) -> None:
    """Freezes the transformer and puts peft's adapters into it, in place."""
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers))
    transformer.add_adapter(config)


@dataclass(frozen=True)
class Features:
    """What the recipe has cached, on its device: scaled latents, text features [B, 300, C] and their mask."""

    latents: Tensor
    embeds: Tensor
    mask: Tensor


class Recipe:
    """Trains what has a gradient in diffusers' transformer."""

    def __init__(self, transformer: SanaTransformer2DModel, features: Features, precision: str, recompute: bool):
        """`precision` is "bf16" for autocast over inputs in bfloat16, or "fp32"."""
        self.transformer = transformer.train()
        if recompute:
            transformer.enable_gradient_checkpointing()
        self.autocasts = precision == "bf16"
        self.dtype = torch.bfloat16 if self.autocasts else torch.float32
        self.features = Features(features.latents.to(self.dtype), features.embeds.to(transformer.dtype), features.mask)
        self.schedule = FlowMatchEulerDiscreteScheduler()  # the script reads no shift out of Sana's files
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)
        self.rates = get_scheduler("constant", self.optimizer)

    def step(self) -> Tensor:
        """One update on the batch; its loss."""
        loss = self.loss(*self.draw())
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        loss.detach().item()  # for its progress bar
        return loss.detach()

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, noise levels [B] and what the transformer is told of them [B]."""
        latents = self.features.latents
        noise = torch.randn_like(latents)
        density = compute_density_for_timestep_sampling(WEIGHTING, len(latents), logit_mean=0.0, logit_std=1.0)
        indices = (density * self.schedule.config.num_train_timesteps).long()
        timesteps = self.schedule.timesteps[indices].to(latents.device)
        known = self.schedule.timesteps.to(latents.device)
        positions = [(known == timestep).nonzero().item() for timestep in timesteps]
        return noise, self.schedule.sigmas.to(latents)[positions], timesteps

    def loss(self, noise: Tensor, sigmas: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of the velocity, in float32."""
        given = self.features
        level = sigmas[:, None, None, None]
        noised = (1 - level) * given.latents + level * noise
        with torch.autocast(noised.device.type, torch.bfloat16, enabled=self.autocasts):
            velocity = self.transformer(
                noised,
                encoder_hidden_states=given.embeds,
                encoder_attention_mask=given.mask,
                timestep=timesteps,
                return_dict=False,
            )[0]
        weights = compute_loss_weighting_for_sd3(WEIGHTING, sigmas=level).float()
        errors = weights * (velocity.float() - (noise - given.latents).float()).square()
        return errors.flatten(1).mean(1).mean()

    def clip(self) -> Tensor:
        """Shortens the gradient to norm 1 at most; the norm that it had."""
        return nn.utils.clip_grad_norm_(self.transformer.parameters(), MAX_GRAD_NORM)
