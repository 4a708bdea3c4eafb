"""The CLIP score: how well a picture and its prompt agree, as a CLIP model sees it.

Hessel et al., "CLIPScore" (arXiv 2104.08718), with the factor 100 that torchmetrics and Sana's own tables use.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

logger = logging.getLogger(__name__)

BATCH = 16  # pictures that go through CLIP at once


class ClipScorer:
    """A scorer: 100 times the cosine between CLIP's features of picture and prompt, -100 to 100, usually 15 to 35."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor):
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_folder(cls, folder: Path, device: str | torch.device = "cpu") -> "ClipScorer":
        """Load what `save_pretrained` of transformers' CLIPModel and CLIPProcessor wrote, as repositories hold it.

        Raises FileNotFoundError where that is not what the folder holds. Nothing is downloaded.
        """
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no config.json. Expected the folder of a whole CLIP model with its tokenizer, such as "
                "a download of openai/clip-vit-large-patch14"
            )
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{folder} holds no whole CLIP model with its tokenizer: {error}") from error
        return cls(model.to(device), processor)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score for each picture and its prompt. What exceeds CLIP's 77 tokens of a prompt is left out."""
        scores = []
        for start in range(0, len(pictures), BATCH):
            batch = slice(start, start + BATCH)
            scores += self._cosines(pictures[batch], prompts[batch])
        return [100 * score for score in scores]

    def _cosines(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        limit = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            images=[picture.convert("RGB") for picture in pictures],
            text=list(prompts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=limit,
        )
        outputs = self.model(**inputs.to(self.model.device))
        if inputs["attention_mask"].sum(dim=1).max() == limit:
            logger.info("CLIP reads %d tokens of a prompt: of longer ones the start is scored", limit)
        return torch.cosine_similarity(outputs.image_embeds.float(), outputs.text_embeds.float()).tolist()
