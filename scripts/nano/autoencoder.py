"""First stage of sana-nano: trains its autoencoder on drawn scenes.

    python -m scripts.nano.autoencoder

First all of it learns. Then the encoder stays as it is, and the decoder goes on: from here on the transformer can be
trained beside it, on the file that has been written.

The latents are drawn to mean 0 and deviation 1 / scaling_factor per channel while training, so that the published
models' factor holds for nano too, and blurred with a little noise, so that the decoder forgives the transformer.
"""

import argparse
import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_core.checkpoint import save_dc_ae
from sana_core.config import AUTOENCODERS
from sana_core.evaluation import scenes
from sana_core.models.dc_ae import DCAE
from sana_core.training.config import TrainConfig
from sana_core.training.loop import Hooks, train
from sana_core.training.loss import Objective, draw_normal

from .drawing import DrawnBatch, DrawnBatches

PRESET = "dc-ae-nano"
LATENT_NOISE = 0.1  # of the latents' deviation


@dataclass(frozen=True)
class Phase:
    """A part of the training."""

    name: str
    steps: int
    crops: tuple[tuple[int, int], ...]  # side and batch size; each step draws one of them
    whole_subject: bool  # in each crop; else a part of it
    squared: float  # weight of the squared error beside the absolute one

    def draw_batch(self, rng: np.random.Generator, step: int) -> DrawnBatch:
        """Crops of one of the sizes."""
        side, count = self.crops[rng.integers(len(self.crops))]
        pixels = draw_crops(rng, side, count, self.whole_subject)
        return DrawnBatch((pixels,), tuple(f"crop {number}" for number in range(count)))


def draw_crops(rng: np.random.Generator, side: int, count: int, whole_subject: bool) -> Tensor:
    """Crops [count, 3, side, side] in [-1, 1] of training scenes, on the latent grid, with the subject or a part."""
    crops = []
    for _ in range(count):
        scene = scenes.train_scene(rng)
        x0, y0, x1, y1 = scenes.subject_box(scene)
        left, top = (_crop_start(rng, low, high, side, whole_subject) for low, high in ((x0, x1), (y0, y1)))
        crops.append(scenes.draw(scene)[top : top + side, left : left + side])
    return to_pixels(np.stack(crops))


def _crop_start(rng: np.random.Generator, low: int, high: int, side: int, whole: bool) -> int:
    """A multiple of 32 whose crop stays inside the picture and has all of [low, high), or a part of it."""
    if whole:
        first, last = max(0, -(-(high - side) // 32)), min(scenes.SIDE - side, low) // 32
    else:
        first, last = max(0, (low - side) // 32 + 1), min(scenes.SIDE - side, high - 1) // 32
    return 32 * int(rng.integers(first, last + 1))


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Reconstruction(Objective):
    """The reconstruction loss."""

    squared: float

    def __call__(self, model: DCAE, batch: DrawnBatch, generators: list[torch.Generator]) -> Tensor:
        (pixels,) = batch.tensors
        deviation = 1 / model.config.scaling_factor
        latent = model.encode(pixels).float()
        noise = draw_normal(latent.shape[1:], generators).to(latent.device)
        decoded = model.decode(latent + LATENT_NOISE * deviation * noise).float()
        channels = latent.transpose(0, 1).flatten(1) / deviation
        spread = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
        return F.l1_loss(decoded, pixels) + self.squared * F.mse_loss(decoded, pixels) + 0.02 * spread


@torch.no_grad()
def measure(model: DCAE, count: int = 32) -> dict[str, float]:
    """PSNR in dB over held-out scenes, whole and inside the subject's box, and the statistics of scaled latents."""
    device = next(model.parameters()).device
    held_out = scenes.HELD_OUT[:count]
    pixels = to_pixels(np.stack([scenes.draw(scene) for scene in held_out])).to(device)
    latents = torch.cat([model.encode(part) for part in pixels.split(8)])
    decoded = torch.cat([model.decode(part) for part in latents.split(8)]).clamp(-1, 1)
    errors = (decoded - pixels).square().mean(1) / 4
    boxes = [scenes.subject_box(scene) for scene in held_out]
    inside = torch.stack([error[y0:y1, x0:x1].mean() for error, (x0, y0, x1, y1) in zip(errors, boxes, strict=True)])
    scaled = latents * model.config.scaling_factor
    return {
        "psnr": -10 * errors.mean((1, 2)).log10().mean().item(),
        "psnr_subject": -10 * inside.log10().mean().item(),
        "latent_mean": scaled.mean().item(),
        "latent_std": scaled.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/nano/autoencoder"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=5000, help="in which all of it learns")
    parser.add_argument("--decoder-steps", type=int, default=6500, help="in which the decoder goes on")
    parser.add_argument("--output", type=Path, default=Path("models/vae/dc_ae_nano.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    torch.manual_seed(0)
    model = DCAE(AUTOENCODERS[PRESET], device=args.device).to(memory_format=torch.channels_last)
    learn(model, Phase("whole", args.steps, ((64, 24), (128, 8), (256, 3)), False, 4.0), args.run, args.output)
    model.encoder.requires_grad_(False)
    learn(
        model, Phase("decoder", args.decoder_steps, ((128, 8), (128, 8), (256, 3)), True, 10.0), args.run, args.output
    )


def learn(model: DCAE, phase: Phase, run: Path, output: Path) -> None:
    """Trains what has a gradient in the model, and writes the average of its weights."""
    config = TrainConfig(
        phase.steps, learning_rate=1e-3, schedule="cosine", warmup_steps=200, ema_decay=0.999, save_every=500
    )
    source = DrawnBatches(phase.draw_batch, size=phase.crops[0][1])
    hooks = Hooks(on_save=lambda model, step: measure(model))
    train(model, source, Reconstruction(phase.squared), config, run / phase.name, hooks=hooks)
    save_dc_ae(copy.deepcopy(model).to(torch.float16), output)
    logging.info("Wrote %s: %s", output, measure(model, 100))


if __name__ == "__main__":
    main()
