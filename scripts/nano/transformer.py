"""Third stage of sana-nano: trains its transformer on the latents and captions of drawn scenes.

    python -m scripts.nano.transformer --run runs/nano/transformer

The autoencoder and the text encoder of the first two stages are frozen; latents are encoded once.
"""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sana_core.checkpoint import load_dc_ae, load_text_encoder, save_transformer
from sana_core.config import TRANSFORMERS
from sana_core.evaluation import scenes
from sana_core.evaluation.judge import evaluate
from sana_core.evaluation.nano import draw_scenes
from sana_core.kernels import REFERENCE
from sana_core.models.dc_ae import DCAE
from sana_core.models.sana import SanaTransformer
from sana_core.pipeline import SanaPipeline
from sana_core.text import TextEncoder
from sana_core.training.batch import Batch
from sana_core.training.config import TrainConfig
from sana_core.training.initialization import initialize_weights
from sana_core.training.loop import Hooks, train
from sana_core.training.loss import FlowMatching

from .autoencoder import to_pixels
from .drawing import DrawnBatches
from .text_encoder import draw_caption, tokenize

PRESET = "sana-nano"


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The reference attention spelled out: on a CPU its gradient is several times faster for a dozen keys."""
    scores = torch.einsum("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("bhnl,blhd->bnhd", scores.softmax(-1), v)


@torch.no_grad()
def encode_scenes(vae: DCAE, count: int, path: Path) -> tuple[Tensor, list[scenes.Scene]]:
    """Scaled latents [count, C, h, w] of training scenes, kept in `path`, and the scenes."""
    rng = np.random.default_rng(7)
    drawn = [scenes.train_scene(rng) for _ in range(count)]
    if path.exists():
        return torch.load(path, weights_only=True), drawn
    device = next(vae.parameters()).device
    latents = []
    for start in tqdm(range(0, count, 4), desc="latents"):
        pixels = to_pixels(np.stack([scenes.draw(scene) for scene in drawn[start : start + 4]])).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents.append((vae.encode(pixels).float() * vae.config.scaling_factor).cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(latents), path)
    return torch.cat(latents), drawn


@torch.no_grad()
def caption_features(encoder: TextEncoder, captions: list[str], chi: bool) -> tuple[Tensor, Tensor]:
    """Features [B, L, C] and mask [B, L] of the captions, BOS first, as `TextEncoder.encode` gives, without padding."""
    ids, mask, features = (part.to(encoder.device) for part in tokenize(encoder.tokenizer, captions, chi))
    hidden = encoder.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
    start = int(features[0].long().argmax())
    hidden, mask = hidden[:, start:], features[:, start:]
    if chi:
        bos = null_caption(encoder).expand(len(captions), -1, -1)
        hidden, mask = torch.cat([bos, hidden], dim=1), torch.cat([mask[:, :1], mask], dim=1)
    return hidden, mask


@torch.no_grad()
def null_caption(encoder: TextEncoder) -> Tensor:
    """Features [1, 1, C] of the empty prompt, which is BOS alone."""
    ids = torch.tensor([[encoder.tokenizer.bos]], device=encoder.device)
    return encoder.model(input_ids=ids, use_cache=False).last_hidden_state.float()


def draw_batch(
    latents: Tensor, drawn: list[scenes.Scene], encoder: TextEncoder, size: int, rng: np.random.Generator, step: int
) -> Batch:
    """Latents of scenes and features of captions, with the instruction in every other step."""
    chosen = rng.integers(len(drawn), size=size)
    captions = [draw_caption(drawn[index], rng)[0] for index in chosen]
    embeds, mask = caption_features(encoder, captions, chi=step % 2 == 0)
    return Batch(latents[torch.from_numpy(chosen)], embeds, mask, tuple(captions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/nano/transformer"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=6400, help="how many are drawn and encoded")
    parser.add_argument("--vae", type=Path, default=Path("models/vae/dc_ae_nano.safetensors"))
    parser.add_argument("--text-encoder", type=Path, default=Path("models/text_encoders/gemma2_nano.safetensors"))
    parser.add_argument("--output", type=Path, default=Path("models/diffusion_models/sana_nano.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    torch.manual_seed(0)
    device = torch.device(args.device)
    vae = load_dc_ae(args.vae, device=device, dtype=torch.float32).to(memory_format=torch.channels_last)
    encoder = load_text_encoder(args.text_encoder, device=device, dtype=torch.float32)
    latents, drawn = encode_scenes(vae, args.scenes, args.run / "latents.pt")
    model = SanaTransformer(
        TRANSFORMERS[PRESET], device=device, kernels=replace(REFERENCE, attention=explicit_attention)
    )
    initialize_weights(model)
    config = TrainConfig(
        steps=args.steps,
        learning_rate=1e-3,
        schedule="linear",
        warmup_steps=200,
        decay_steps=args.steps // 2,
        ema_decay=0.999,
        save_every=500,
    )

    def measure(average: SanaTransformer, step: int) -> dict[str, float]:
        save = step // config.save_every
        language, wanted = scenes.LANGUAGES[save % 3], list(scenes.HELD_OUT[save % 10 :: 10])
        scores = evaluate(draw_scenes(SanaPipeline(average, vae, encoder), wanted, language), wanted)
        return {f"{language}_{name}": getattr(scores, name) for name in ("background", "place", "subject")}

    source = DrawnBatches(partial(draw_batch, latents, drawn, encoder, args.batch), args.batch)
    objective = FlowMatching(model.config.shift, null_caption(encoder)[0])
    average = train(model, source, objective, config, args.run, hooks=Hooks(on_save=measure))
    save_transformer(average.to(torch.float16), args.output)
    logging.info("Wrote %s", args.output)


if __name__ == "__main__":
    main()
