"""Scores of pictures, and the best of a batch."""

import logging

import comfy.model_management
from comfy_api.latest import io
from einops import rearrange
from torch import nn

from ..sana_core.evaluation import ranking, score_pictures
from ..sana_core.evaluation.clip import ClipScorer
from ..sana_core.evaluation.nano import NanoScorer
from ..sana_core.pictures import to_pictures
from .model_files import find_model, list_model_folders
from .notice import notice
from .patcher import WholePatcher

log = logging.getLogger(__name__)

NANO = "sana-nano"
ScorerType = io.Custom("SANA_SCORER")  # a callable: pictures (PIL) and prompts to numbers, the higher the better


class ManagedClipScorer:
    """A ClipScorer that ComfyUI moves to the GPU when it is asked, and off it again when others need the memory."""

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer
        management = comfy.model_management
        # In a list, since transformers' models do not let the patcher set their device.
        self.patcher = WholePatcher(
            nn.ModuleList([scorer.model]),
            load_device=management.text_encoder_device(),
            offload_device=management.text_encoder_offload_device(),
        )

    def __call__(self, pictures, prompts) -> list[float]:
        """One score for each picture and its prompt."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.scorer(pictures, prompts)


class SanaScorerLoader(io.ComfyNode):
    """A CLIP model's folder, or sana-nano's judge, to SANA_SCORER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaScorerLoader",
            display_name="Load Sana Scorer",
            category="sana/loaders",
            description="Loads what gives pictures a score against their prompt: a CLIP model, or the judge of "
            "sana-nano's pictures.",
            search_aliases=["clip score", "aesthetic score", "load clip", "best of n"],
            inputs=[
                io.Combo.Input(
                    "scorer_name",
                    options=[NANO, *list_model_folders("clip_vision")],
                    tooltip="Folder in models/clip_vision with a whole CLIP model and its tokenizer, such as "
                    "openai/clip-vit-large-patch14. sana-nano needs no file and knows its own pictures only.",
                )
            ],
            outputs=[ScorerType.Output("scorer", display_name="SCORER", tooltip="For Sana Pick Best.")],
        )

    @classmethod
    def execute(cls, scorer_name) -> io.NodeOutput:
        """The scorer. Raises FileNotFoundError for a folder that holds no whole CLIP model."""
        if scorer_name == NANO:
            return io.NodeOutput(NanoScorer())
        return io.NodeOutput(ManagedClipScorer(ClipScorer.from_folder(find_model("clip_vision", scorer_name))))


class SanaPickBest(io.ComfyNode):
    """The best pictures of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaPickBest",
            display_name="Sana Pick Best",
            category="sana/image",
            description="Keeps the best pictures of a batch: those that the scorer finds closest to the prompt. Shows "
            "every picture's score.",
            search_aliases=["best of n", "rank images", "clip score", "inference-time scaling", "select image"],
            inputs=[
                io.Image.Input("images", tooltip="The batch: raise batch_size of the empty latent to have a choice."),
                ScorerType.Input("scorer", tooltip="From Load Sana Scorer, or from another pack's node."),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="What the pictures shall show, as they were drawn."
                ),
                io.Int.Input("count", default=1, min=1, max=4096, tooltip="How many of the best pictures to keep."),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE", tooltip="The best pictures, the very best first."),
                io.Int.Output(
                    "best_index",
                    display_name="best_index",
                    tooltip="Which of the batch is the best, from 0: the batch_index of Latent From Batch.",
                ),
                io.Float.Output("best_score", display_name="best_score", tooltip="The score of the best picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, scorer, prompt, count=1) -> io.NodeOutput:
        """The best `count` pictures. Raises ValueError for a count above the batch's, or scores that are no numbers."""
        if count > len(images):
            raise ValueError(f"The best {count} of {len(images)} pictures asked for: lower count, or draw more.")
        pictures = to_pictures(rearrange(images[..., :3], "b h w c -> b c h w").clamp(0, 1))
        scores = score_pictures(scorer, pictures, [prompt] * len(pictures))
        order = ranking(scores)
        text = "\n".join(f"{index}: {scores[index]:.4f}" for index in order)
        log.info("scores of the batch, best first:\n%s", text)
        return io.NodeOutput(images[order[:count]], order[0], scores[order[0]], ui=notice(text, cls.hidden))
