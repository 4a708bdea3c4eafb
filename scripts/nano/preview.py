"""Fits the linear map from scaled latents to colours that ComfyUI's previews of sana-nano use.

    python -m scripts.nano.preview

Writes the factors [32, 3] and the bias [3], for colours in [-1, 1] of latents scaled to unit deviation.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_core.checkpoint import load_dc_ae
from sana_core.evaluation import scenes
from sana_core.models.dc_ae import DCAE

from .autoencoder import to_pixels


@torch.no_grad()
def fit(vae: DCAE, count: int) -> tuple[Tensor, float]:
    """Factors and bias stacked [33, 3], by least squares over training scenes, and the part of variance explained."""
    rng = np.random.default_rng(11)
    pixels = to_pixels(np.stack([scenes.draw(scenes.train_scene(rng)) for _ in range(count)]))
    latents = torch.cat([vae.encode(part) for part in pixels.split(8)]) * vae.config.scaling_factor
    colours = F.avg_pool2d(pixels, vae.config.spatial_compression).permute(0, 2, 3, 1).flatten(0, 2)
    inputs = F.pad(latents.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(inputs.double(), colours.double()).solution
    residual = (inputs.double() @ solution - colours).var(0).sum() / colours.double().var(0).sum()
    return solution.float(), 1 - residual.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("models/vae/dc_ae_nano.safetensors"))
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("nodes/preview_factors.json"))
    args = parser.parse_args()
    solution, explained = fit(load_dc_ae(args.vae, dtype=torch.float32), args.scenes)
    table = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = [[round(value, 4) for value in row] for row in solution.tolist()]
    note = f"least squares over {args.scenes} scenes; explains {explained:.0%} of the variance"
    table["dc-ae-nano"] = {"note": note, "factors": rows[:-1], "bias": rows[-1]}
    args.output.write_text(_one_row_per_line(table) + "\n", encoding="utf-8")


def _one_row_per_line(table: dict) -> str:
    """Indented JSON whose innermost lists stay on one line."""
    innermost = r"\[[^\[\]]*\]"
    return re.sub(innermost, lambda found: json.dumps(json.loads(found.group())), json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
