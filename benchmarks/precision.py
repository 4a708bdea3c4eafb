"""What number formats cost: sana-nano's pictures and scores, and random blocks of the published widths.

    python -m benchmarks.precision --pictures 40

writes a table, and the same figures as JSON. It rounds weights as the MODEL of ComfyUI has them (a test holds both
together) and computes in plain PyTorch: 8-bit weights compute in bfloat16, as they do on a GPU without --fast.
"""

import argparse
import datetime
import json
import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sana_core.config import TRANSFORMERS
from sana_core.evaluation import scenes
from sana_core.evaluation.judge import evaluate
from sana_core.evaluation.nano import draw_scenes
from sana_core.kernels import REFERENCE
from sana_core.models.layers import SanaBlock
from scripts.nano.score import load_nano

logger = logging.getLogger(__name__)

WIDTHS = {"0.6B": "Sana_600M_1024px", "1.6B": "Sana_1600M_1024px"}
SIDE = 32  # latent positions a side: 1024 tokens
CAPTION = 300  # tokens
BASES = ("float32", "bfloat16")  # what pictures are compared with
SEED = 0


@dataclass(frozen=True)
class Precision:
    """How weights are stored and computed with."""

    compute: torch.dtype
    stored: torch.dtype | None = None  # of linear layers and convolutions; None: as they compute
    scaled: bool = False  # only linear weights, each with a scale that spends the format's whole range

    def apply(self, model: nn.Module) -> nn.Module:
        """Round the weights of a float32 model, and let it compute in `compute`."""
        if self.stored is not None:
            for parameter in self._narrow_parameters(model):
                parameter.data = self._rounded(parameter.data)
        return model.to(self.compute)

    def _narrow_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        for module in model.modules():
            if self.scaled and isinstance(module, nn.Linear):
                yield module.weight
            elif not self.scaled and isinstance(module, nn.Linear | nn.Conv2d):
                yield from module.parameters(recurse=False)

    def _rounded(self, weight: Tensor) -> Tensor:
        scale = weight.abs().max() / torch.finfo(self.stored).max if self.scaled else 1.0
        return (weight / scale).to(self.stored).float() * scale


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "fp8_e4m3fn": Precision(torch.bfloat16, torch.float8_e4m3fn),
    "fp8_e5m2": Precision(torch.bfloat16, torch.float8_e5m2),
    "fp8_e4m3fn, scaled": Precision(torch.bfloat16, torch.float8_e4m3fn, scaled=True),
    "fp8_e5m2, scaled": Precision(torch.bfloat16, torch.float8_e5m2, scaled=True),
}


def random_block(preset: str) -> SanaBlock:
    """A block of a published width with float32 weights of unit gain."""
    config = TRANSFORMERS[preset]
    block = SanaBlock(config, nn, REFERENCE)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in block.parameters():
            gain = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(gain * torch.randn(parameter.shape, generator=generator))
    return block.eval()


@torch.no_grad()
def block_output(block: SanaBlock, dtype: torch.dtype) -> Tensor:
    """What the block adds to random tokens [1, 1024, C], float32."""
    size = block.attn.proj.in_features
    generator = torch.Generator().manual_seed(SEED + 1)
    x, caption, t0 = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, SIDE * SIDE, size), (1, CAPTION, size), (1, 6 * size))
    )
    return (block(x, block.cross_attn.keys_values(caption), None, t0, SIDE, SIDE) - x).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected."""
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def block_errors(precision: Precision) -> dict[str, float]:
    """Relative error of a random block against float32, for each width."""
    errors = {}
    for name, preset in WIDTHS.items():
        expected = block_output(random_block(preset), torch.float32)
        block = precision.apply(random_block(preset))
        errors[name] = relative_error(block_output(block, precision.compute), expected)
    return errors


def psnr(pictures: np.ndarray, others: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels of uint8 pictures; None where they are the same."""
    error = np.square(pictures.astype(np.float64) - others).mean()
    return float(10 * np.log10(255**2 / error)) if error else None


def measure(count: int) -> dict[str, dict]:
    """All figures of each precision."""
    wanted = list(scenes.HELD_OUT[:count])
    pictures, figures = {}, {}
    for name, precision in PRECISIONS.items():
        pipe = load_nano("cpu")
        precision.apply(pipe.transformer)
        pictures[name] = np.stack(draw_scenes(pipe, wanted, "en"))
        scores = evaluate(pictures[name], wanted)
        figures[name] = {
            **{f"psnr_to_{other}": psnr(pictures[name], pictures[other]) for other in BASES if other in pictures},
            "scores": {part: getattr(scores, part) for part in ("background", "place", "subject")},
            "block_errors": block_errors(precision),
        }
        logger.info("%s: %s", name, figures[name])
    return figures


def table(figures: dict[str, dict]) -> str:
    """The figures as Markdown."""
    lines = [
        "| Weights | Block 0.6B | Block 1.6B | PSNR to float32 | PSNR to bfloat16 | Subject | Place | Background |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        errors = [f"{100 * row['block_errors'][width]:.2f} %" for width in WIDTHS]
        ratios = [_decibels(row.get(f"psnr_to_{other}")) for other in BASES]
        scores = [f"{100 * row['scores'][part]:.1f} %" for part in ("subject", "place", "background")]
        lines.append(f"| {' | '.join([name, *errors, *ratios, *scores])} |")
    return "\n".join(lines)


def _decibels(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40, help="of sana-nano, for each precision")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "precision.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    figures = measure(args.pictures)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {platform.machine()}, one thread",
        "torch": torch.__version__,
        "pictures": args.pictures,
        "figures": figures,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(figures)}\n")


if __name__ == "__main__":
    main()
