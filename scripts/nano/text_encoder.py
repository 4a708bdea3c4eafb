"""Second stage of sana-nano: trains its tokenizer and its Gemma-2 text encoder on the scenes' captions.

    python -m scripts.nano.text_encoder --run runs/nano/text_encoder

A random encoder would do; this one learns to say subject, background and place from the mean of its features, so
that a panda, a 熊猫 and a 🐼 look alike to the transformer, which then learns faster.
"""

import argparse
import io
import logging
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from sana_core.checkpoint import save_text_encoder
from sana_core.evaluation import scenes
from sana_core.text import CHI, TextEncoder, Tokenizer
from sana_core.training.config import TrainConfig
from sana_core.training.loop import Hooks, train
from sana_core.training.loss import Objective

from .drawing import DrawnBatch, DrawnBatches

VOCABULARY = 1200
CONFIG = Gemma2Config(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    query_pre_attn_scalar=48,
    sliding_window=32,
    layer_types=["sliding_attention"] * 2,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
RECEPTIVE_FIELD = CONFIG.num_hidden_layers * (CONFIG.sliding_window - 1)
BATCH = 96
NAME_ALONE = 0.1  # part of the captions that name the subject and leave the rest open


def train_tokenizer() -> Tokenizer:
    """A SentencePiece model of all captions and the human instruction, with Gemma's special ids and byte fallback."""
    sentences = [
        caption
        for subject in scenes.SUBJECTS
        for background in scenes.BACKGROUNDS
        for place in scenes.PLACES
        for captions in scenes.all_captions(scenes.Scene(subject, background, place, scenes.SIZES[0])).values()
        for caption in captions
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + CHI.split("\n") * 300),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def draw_caption(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption of the scene in a language drawn by `rng`, and whether it is the subject's name alone."""
    if rng.random() < NAME_ALONE:
        subject = scene.subject
        return (subject.emoji, subject.zh, subject.name, f"a {subject.name}")[rng.integers(4)], True
    return scenes.caption(scene, scenes.LANGUAGES[rng.integers(3)], rng), False


def tokenize(tokenizer: Tokenizer, captions: list[str], chi: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [B, N], padded on the right, and which positions are features of the caption [B, N].

    Of the instruction only as many tokens are kept as can reach the caption through the sliding windows, so that
    the caption's features are those of the whole instruction.
    """
    prefix = tokenizer.encode(CHI) if chi else [tokenizer.bos]
    rows = []
    for caption in captions:
        ids = tokenizer.encode(CHI + caption if chi else caption)
        first = len(prefix) - 1 if chi else 0  # the space that ends the instruction belongs to the caption
        rows.append(ids[max(0, first - RECEPTIVE_FIELD) :])
    start = min(RECEPTIVE_FIELD, len(prefix) - 1) if chi else 0
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    features = mask.bool() & (torch.arange(length) >= start)
    return ids, mask, features


class CaptionReader(nn.Module):
    """The text encoder with a linear head for each of subject, background and place."""

    def __init__(self):
        super().__init__()
        self.encoder = Gemma2Model._from_config(CONFIG, attn_implementation="eager")
        counts = len(scenes.SUBJECTS), len(scenes.BACKGROUNDS), len(scenes.PLACES)
        self.heads = nn.ModuleList(nn.Linear(CONFIG.hidden_size, count) for count in counts)

    def forward(self, ids: Tensor, mask: Tensor, features: Tensor) -> list[Tensor]:
        """Logits of subject, background and place [B, count]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        mean = (hidden * features[:, :, None]).sum(1) / features.sum(1, keepdim=True)
        return [head(mean) for head in self.heads]


def labels(scene: scenes.Scene) -> tuple[int, int, int]:
    """Indices of subject, background and place."""
    return (
        scenes.SUBJECTS.index(scene.subject),
        scenes.BACKGROUNDS.index(scene.background),
        scenes.PLACES.index(scene.place),
    )


def draw_batch(tokenizer: Tokenizer, rng: np.random.Generator, step: int) -> DrawnBatch:
    """Tokens of captions, with the instruction in every other step, and what is to be read from them."""
    batch = [scenes.train_scene(rng) for _ in range(BATCH)]
    captions, alone = zip(*(draw_caption(scene, rng) for scene in batch), strict=True)
    targets = torch.tensor([labels(scene) for scene in batch])
    targets[torch.tensor(alone), 1:] = -100  # background and place are open: cross entropy's index to ignore
    return DrawnBatch((*tokenize(tokenizer, list(captions), chi=step % 2 == 0), targets), captions)


class Reading(Objective):
    """The classification loss."""

    def __call__(self, model: CaptionReader, batch: DrawnBatch, generators: list[torch.Generator]) -> Tensor:
        *inputs, targets = batch.tensors
        return sum(F.cross_entropy(logits, target) for logits, target in zip(model(*inputs), targets.T, strict=True))


@torch.no_grad()
def measure(model: CaptionReader, tokenizer: Tokenizer) -> dict[str, float]:
    """Part of held-out captions whose subject, background and place are all read right, by language and instruction."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(1)
    result = {}
    targets = torch.tensor([labels(scene) for scene in scenes.HELD_OUT], device=device)
    for language in scenes.LANGUAGES:
        captions = [scenes.caption(scene, language, rng) for scene in scenes.HELD_OUT]
        for chi in (True, False):
            logits = model(*(part.to(device) for part in tokenize(tokenizer, captions, chi)))
            guesses = torch.stack([part.argmax(1) for part in logits], dim=1)
            result[f"{language}{'_chi' if chi else ''}"] = (guesses == targets).all(1).float().mean().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/nano/text_encoder"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("models/text_encoders/gemma2_nano.safetensors"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    model = CaptionReader().to(args.device)
    config = TrainConfig(
        steps=args.steps,
        learning_rate=2e-3,
        schedule="linear",
        decay_steps=args.steps // 2,
        ema_decay=0.99,
        precision="fp32",
    )
    source = DrawnBatches(partial(draw_batch, tokenizer), BATCH)
    hooks = Hooks(on_save=lambda model, _: measure(model, tokenizer))
    average = train(model, source, Reading(), config, args.run, hooks=hooks)
    save_text_encoder(TextEncoder(average.encoder.to(torch.bfloat16), tokenizer), args.output)
    logging.info("Wrote %s: %s", args.output, measure(average.float(), tokenizer))


if __name__ == "__main__":
    main()
