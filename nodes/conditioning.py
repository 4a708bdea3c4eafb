"""Prompts to conditionings, as the official Sana code encodes them."""

import logging

from comfy.text_encoders.pixeldit import PixelDiTGemma2Tokenizer
from comfy_api.latest import io

from ..sana_core.styles import NO_STYLE, STYLES, apply_style
from ..sana_core.text import CHI, Tokenizer, Tokens, instruction_text
from .clip import PromptTokenizer
from .notice import notice

log = logging.getLogger(__name__)

NEGATIVE = " (negative)"  # after a style's name: the words that it keeps away from
_STYLES = [*STYLES, *(name + NEGATIVE for name, style in STYLES.items() if style.negative)]


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
                    "exceeds them is left out, and the node says where. Empty is the null caption.",
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
                io.Combo.Input(
                    "style",
                    options=_STYLES,
                    default=NO_STYLE,
                    optional=True,
                    tooltip="Words of the official demo around the text. For the negative prompt choose the same style "
                    "with (negative): it puts what the style avoids before the text.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING", tooltip="The encoded prompt.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text, use_instruction=True, instruction=CHI, style=NO_STYLE) -> io.NodeOutput:
        """A conditioning [1, 300, C] with its attention mask. Raises ValueError for a CLIP that is no Gemma-2."""
        chi = instruction if use_instruction and instruction.strip() else False
        tokens, sequence = _tokenize(clip, _styled(style, text), chi)
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        return io.NodeOutput(conditioning, ui=notice(_length(sequence), cls.hidden))


def _tokenize(clip, text: str, chi: str | bool) -> tuple[dict, Tokens]:
    """Tokens as the CLIP wants them, and as we count them."""
    if isinstance(clip.tokenizer, PromptTokenizer):
        return clip.tokenize(text, chi=chi), clip.tokenizer.tokenizer.tokenize(text, instruction_text(chi))
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
    tokenizer = Tokenizer(clip.tokenizer.gemma2_2b.tokenizer.tokenizer.serialized_model_proto())
    return clip.tokenize(text), tokenizer.tokenize(text, CHI)


def _styled(choice: str, text: str) -> str:
    """The text with the words of a style, or, where the choice is for the negative prompt, with what it avoids."""
    name = choice.removesuffix(NEGATIVE)
    prompt, negative = apply_style(name, text, text)
    return prompt if name == choice else negative


def _length(sequence: Tokens) -> str:
    """How long the text is, and what was left out of it."""
    warning = f"\n\N{WARNING SIGN} {sequence.warning}" if sequence.warning else ""
    return f"{sequence.count}{warning}"
