"""Pictures that a run draws of itself: the same prompts and noise each time, so that only the weights change them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..models.dc_ae import DCAE
from ..models.sana import SanaTransformer
from ..pictures import to_pictures, write_png
from ..pipeline import SanaPipeline
from ..text import TextEncoder

logger = logging.getLogger(__name__)

FOLDER = "samples"  # in the folder of a run


class NegativeCaption:
    """Stands for the text encoder, which need not stay in memory: it knows the empty negative prompt alone."""

    def __init__(self, embeds: Tensor, mask: Tensor):
        """Features [1, L, C] and mask [1, L]."""
        self._embeds, self._mask = embeds, mask

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self._embeds.shape[-1]

    def encode(self, prompts: Sequence[str], *, chi: bool | str = False) -> tuple[Tensor, Tensor]:
        """Features and mask, once for each prompt."""
        return self._embeds.expand(len(prompts), -1, -1), self._mask.expand(len(prompts), -1)


class Samples:
    """Prompts, encoded before training starts, and what draws them."""

    def __init__(
        self,
        prompts: Sequence[str],
        encoder: TextEncoder,
        vae: DCAE,
        size: int,
        decode: Callable[[Tensor], Tensor],
    ):
        """`size`: pixels a side; `decode`: scaled latents [B, C, h, w] to pixels [B, 3, H, W] in 0..1."""
        self.prompts = tuple(prompts)
        self._captions = [[part.cpu() for part in encoder.encode(prompt)] for prompt in self.prompts]
        self._negative = NegativeCaption(*(part.cpu() for part in encoder.encode("", chi=False)))
        self._vae, self._size, self._decode = vae, size, decode

    def draw(self, model: SanaTransformer) -> list[Image.Image]:
        """One picture of each prompt, with the prompt's number as seed."""
        pipe = SanaPipeline(model, self._vae, self._negative)
        pictures = []
        for seed, (embeds, mask) in enumerate(self._captions):
            latents = pipe(
                prompt_embeds=embeds,
                prompt_mask=mask,
                height=self._size,
                width=self._size,
                seed=seed,
                output_type="latent",
            )
            pictures += to_pictures(self._decode(latents))
        return pictures

    def write(self, pictures: Sequence[Image.Image], run: Path, step: int) -> None:
        """As PNG, with the prompt inside. A disk that is full must not end a run: then there is a warning."""
        folder = run / FOLDER
        for number, (picture, prompt) in enumerate(zip(pictures, self.prompts, strict=True)):
            notes = {"prompt": prompt, "seed": number, "step": step}
            try:
                folder.mkdir(exist_ok=True)
                write_png(picture, folder / f"step_{step:08d}_{number + 1}.png", notes)
            except OSError as error:
                logger.warning("%s", error)
