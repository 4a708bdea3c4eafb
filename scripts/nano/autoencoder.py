"""First stage of sana-nano: trains its autoencoder on drawn scenes.

    python -m scripts.nano.autoencoder --run runs/nano/autoencoder
    python -m scripts.nano.autoencoder --run runs/nano/decoder --decoder-of models/vae/dc_ae_nano.safetensors

The second command goes on with the decoder alone, which may run beside the transformer's training.

The latents are drawn to mean 0 and deviation 1 / scaling_factor per channel while training, so that the published
models' factor holds for nano too, and blurred with a little noise, so that the decoder forgives the transformer.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_core.checkpoint import load_dc_ae, save_dc_ae
from sana_core.config import AUTOENCODERS
from sana_core.evaluation import scenes
from sana_core.models.dc_ae import DCAE
from sana_core.training.config import TrainConfig
from sana_core.training.loop import Hooks, train
from sana_core.training.loss import Objective, draw_normal

from .drawing import DrawnBatch, DrawnBatches

PRESET = "dc-ae-nano"
LATENT_NOISE = 0.1  # of the latents' deviation
CROPS = ((64, 24), (128, 8), (256, 3))  # side and batch size; each step draws one of the three


def draw_crops(rng: np.random.Generator, side: int, count: int) -> Tensor:
    """Crops [count, 3, side, side] in [-1, 1] of training scenes, on the latent grid and touching the subject."""
    crops = []
    for _ in range(count):
        scene = scenes.train_scene(rng)
        x0, y0, x1, y1 = scenes.subject_box(scene)
        left, top = (_crop_start(rng, low, high, side) for low, high in ((x0, x1), (y0, y1)))
        crops.append(scenes.draw(scene)[top : top + side, left : left + side])
    return to_pixels(np.stack(crops))


def _crop_start(rng: np.random.Generator, low: int, high: int, side: int) -> int:
    """A multiple of 32 whose crop touches [low, high) and stays inside the picture."""
    first = max(0, (low - side) // 32 + 1)
    last = min(scenes.SIDE - side, high - 1) // 32
    return 32 * int(rng.integers(first, last + 1))


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(rng: np.random.Generator, step: int) -> DrawnBatch:
    """Crops of one of the sizes."""
    side, count = CROPS[rng.integers(len(CROPS))]
    return DrawnBatch((draw_crops(rng, side, count),), tuple(f"crop {number}" for number in range(count)))


class Reconstruction(Objective):
    """The reconstruction loss."""

    def __call__(self, model: DCAE, batch: DrawnBatch, generators: list[torch.Generator]) -> Tensor:
        (pixels,) = batch.tensors
        deviation = 1 / model.config.scaling_factor
        latent = model.encode(pixels).float()
        noise = draw_normal(latent.shape[1:], generators).to(latent.device)
        decoded = model.decode(latent + LATENT_NOISE * deviation * noise).float()
        channels = latent.transpose(0, 1).flatten(1) / deviation
        spread = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
        return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 0.02 * spread


@torch.no_grad()
def measure(model: DCAE, count: int = 64) -> dict[str, float]:
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
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--decoder-of", type=Path, help="trains only the decoder of this autoencoder")
    parser.add_argument("--output", type=Path, default=Path("models/vae/dc_ae_nano.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    torch.manual_seed(0)
    device = torch.device(args.device)
    if args.decoder_of is None:
        model = DCAE(AUTOENCODERS[PRESET], device=device)
    else:
        model = load_dc_ae(args.decoder_of, device=device, dtype=torch.float32)
        model.encoder.requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)
    config = TrainConfig(
        steps=args.steps, learning_rate=1e-3, schedule="linear", decay_steps=args.steps // 2, ema_decay=0.999
    )
    source = DrawnBatches(draw_batch, size=CROPS[0][1])
    hooks = Hooks(on_save=lambda model, step: measure(model))
    average = train(model, source, Reconstruction(), config, args.run, hooks=hooks)
    save_dc_ae(average.to(torch.float16), args.output)
    logging.info("Wrote %s: %s", args.output, measure(average.float(), len(scenes.HELD_OUT)))


if __name__ == "__main__":
    main()
