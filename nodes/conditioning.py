"""Prompts to conditionings, as the official Sana code encodes them."""

import logging

from comfy.text_encoders.pixeldit import PixelDiTGemma2Tokenizer
from comfy_api.latest import io

from ..sana_core.text import CHI
from .clip import PromptTokenizer

log = logging.getLogger(__name__)


class SanaPromptEncode(io.ComfyNode):
    """Prompt to CONDITIONING, with or without the instruction before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaPromptEncode",
            display_name="Sana Prompt Encode",
            category="sana/conditioning",
            description="Encodes a prompt as Sana was trained: after an instruction that makes Gemma-2 imagine "
            "details. For a negative prompt switch the instruction off.",
            search_aliases=["clip text encode", "negative prompt", "chi", "complex human instruction", "gemma"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="Gemma-2 from Load Sana Text Encoder, or from Load CLIP with type pixeldit."
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the picture shall show, in English, Chinese or emoji. About 300 tokens count; what "
                    "exceeds them is left out, and the log says where. Empty is the null caption.",
                ),
                io.Boolean.Input(
                    "use_instruction",
                    default=True,
                    optional=True,
                    tooltip="Put the instruction before the text. Switch it off for a negative prompt, or for a more "
                    "literal picture. An empty text never gets it.",
                ),
                io.String.Input(
                    "instruction",
                    default=CHI,
                    optional=True,
                    multiline=True,
                    advanced=True,
                    tooltip="The instruction. The default is the official text, which the models were trained with. It "
                    "ends with a space, which the text follows.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="The encoded prompt.")
            ],
        )

    @classmethod
    def execute(cls, clip, text, use_instruction=True, instruction=CHI) -> io.NodeOutput:
        """A conditioning [1, 300, C] with its attention mask."""
        chi = instruction if use_instruction and instruction.strip() else False
        return io.NodeOutput(_encode(clip, text, chi))


def _encode(clip, text: str, chi: str | bool):
    if isinstance(clip.tokenizer, PromptTokenizer):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text, chi=chi))
    if not isinstance(clip.tokenizer, PixelDiTGemma2Tokenizer):
        raise ValueError(
            f"This CLIP is no Gemma-2 as Sana uses it (its tokenizer is {type(clip.tokenizer).__name__}). Connect "
            "Load Sana Text Encoder, or Load CLIP with type pixeldit."
        )
    if text.strip() and chi != CHI:
        log.warning(
            "Load CLIP always puts the official instruction before a text, so %r gets it too. Load Sana Text Encoder "
            "can leave it out or change it.",
            text[:40],
        )
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
