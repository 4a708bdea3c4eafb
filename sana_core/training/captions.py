"""The captions of a training picture: how they are read, and which of several is drawn."""

import codecs
import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """One description of a picture, and how well it fits by CLIP's judgement, about 0 to 40; None if not judged."""

    text: str
    score: float | None = None


@dataclass(frozen=True)
class CaptionChoice:
    """How one of several captions is drawn; the values are those of the official configurations."""

    threshold: float = 25.0  # captions below it are drawn only if all are
    temperature: float = 0.1  # weight = score^(1 / temperature)

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise ValueError(f"The caption threshold is {self.threshold}, expected a CLIP score, about 0 to 40.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"The caption temperature is {self.temperature}, expected 0 or more: near 0 takes the caption that "
                "scores best, 1 weighs captions by their scores."
            )

    def weights(self, captions: Sequence[Caption]) -> list[float]:
        """Probability of each caption (NVlabs/Sana `weighted_sample_clipscore`).

        Captions without a score have none where others are scored. Where no caption is scored, upstream takes the
        first; here all are equally likely.
        """
        scores = [caption.score for caption in captions]
        if all(score is None for score in scores):
            return [1 / len(captions)] * len(captions)
        best = max(score for score in scores if score is not None)
        if best < self.threshold or best <= 0:
            first = scores.index(best)
            return [float(index == first) for index in range(len(captions))]
        # Divided by the best first: score^10 of any size stays in range.
        eligible = [score is not None and score >= self.threshold and score > 0 for score in scores]
        raw = [
            (score / best) ** (1 / max(self.temperature, 0.01)) if counts else 0.0
            for score, counts in zip(scores, eligible, strict=True)
        ]
        return [weight / sum(raw) for weight in raw]

    def draw(self, captions: Sequence[Caption], rng: random.Random) -> int:
        """Index of the caption drawn."""
        return rng.choices(range(len(captions)), self.weights(captions))[0]


OFFICIAL_CHOICE = CaptionChoice()


def decode_caption(content: bytes) -> str:
    """Text of a caption file: whole, without white space around it. A byte order mark and CRLF leave no trace.

    Raises ValueError for anything but UTF-8, and UTF-16 with its mark, which Windows writes: a guess would train on
    garbage without a word.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        byte = content[error.start]
        kind = encoding.removesuffix("-sig").upper()
        raise ValueError(f"its text is not {kind} (byte {error.start} is 0x{byte:02x}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("its text holds NUL bytes, so it is not plain UTF-8; save it as UTF-8")
    return clean_caption(text)


def clean_caption(text: str) -> str:
    """Composed Unicode (NFC), one kind of line end, no white space around it.

    Half of a surrogate pair, which JSON can spell and no encoder can read, becomes U+FFFD.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
