"""The Fréchet Inception distance between two sets of pictures (Heusel et al., arXiv 1706.08500), by torchmetrics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ImageOps
from torch import Tensor, nn

from ..pictures import open_picture

INSTALL = "pip install torchmetrics torch-fidelity"
WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


def frechet_distance(
    pictures: Sequence[Path],
    reference: Sequence[Path],
    network: Path | nn.Module,
    device: str | torch.device = "cpu",
) -> float:
    """FID between two sets of picture files; 0 for the same set. Sizes may differ.

    network: the file of torch-fidelity's Inception weights (`WEIGHTS_URL`), whose 2048 features are compared, or a
        module from uint8 pixels [B, 3, H, W] to features [B, num_features] that takes its place.

    Raises ValueError for fewer than two pictures in a set, FileNotFoundError for missing weights, ImportError that
    says what to install.
    """
    for name, paths in (("pictures", pictures), ("reference pictures", reference)):
        if len(paths) < 2:
            raise ValueError(f"the Fréchet distance is one of covariances: {len(paths)} {name} are too few")
    metric = _metric(network).to(device)
    for paths, real in ((pictures, False), (reference, True)):
        for path in paths:
            metric.update(_read(path).to(device), real=real)
    return max(0.0, float(metric.compute()))  # rounding can leave it just below


def _metric(network: Path | nn.Module):
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID is computed by torchmetrics, which is not installed. Install it: {INSTALL}") from error
    if isinstance(network, nn.Module):
        return FrechetInceptionDistance(feature=network)
    if not network.is_file():
        raise FileNotFoundError(f"there are no Inception weights at {network}. Download them from {WEIGHTS_URL}")
    try:
        return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(network))
    except ModuleNotFoundError as error:
        raise ImportError(f"FID needs torch-fidelity's Inception, which is not installed: {INSTALL}") from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{network} does not hold the weights that {WEIGHTS_URL} holds: {error}") from error


def _read(path: Path) -> Tensor:
    """Pixels uint8 [1, 3, H, W]."""
    picture = ImageOps.exif_transpose(open_picture(path)).convert("RGB")
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w")
