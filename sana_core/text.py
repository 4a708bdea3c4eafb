"""A prompt becomes the caption features that a Sana transformer attends to.

Gemma-2 reads an instruction (CHI, the "complex human instruction") followed by the prompt. Only the hidden states of
BOS and of the 299 positions after the instruction are kept: being causal, they carry the instruction's influence.
Source of the text and of the selection: NVlabs/Sana `app/sana_pipeline.py` and `configs/sana_app_config/*.yaml`.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import sentencepiece
import torch

logger = logging.getLogger(__name__)

MAX_TOKENS = 300  # positions that the transformer sees: BOS and 299 more

# The official text, to the letter. Diffusers' copy has single quotes around "Enhanced prompt".
CHI = "\n".join(
    (
        'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for'
        " image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial"
        " relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without"
        " overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping"
        " peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street"
        " lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass"
        " skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional"
        " commentary or evaluations:",
        "User Prompt: ",
    )
)


def instruction_text(chi: bool | str) -> str:
    """The text that precedes the prompt: `True` the official one, a string itself, `False` none."""
    if chi is True:
        return CHI
    return chi or ""


def token_budget(instruction_tokens: int) -> int:
    """Length of the whole sequence, BOS and padding included, for an instruction of that many tokens (BOS included).

    The two that are taken off are BOS, which both parts count, and the space that ends the instruction, which is a
    token of its own there but merges with the first word of the prompt.
    """
    return instruction_tokens + MAX_TOKENS - 2 if instruction_tokens else MAX_TOKENS


def select_positions(length: int) -> torch.Tensor:
    """Positions kept of a sequence of `length` tokens: BOS and the last 299. Shape [300]."""
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(length - MAX_TOKENS + 1, length)])


@dataclass(frozen=True)
class Tokens:
    """One sequence of ids, padded on the right, and what happened to the prompt in it."""

    ids: list[int]  # instruction, prompt, padding
    mask: list[int]  # 1 at instruction and prompt, 0 at padding
    prompt_tokens: int  # of the whole prompt, without BOS
    kept_text: str | None  # what was kept of a prompt that is too long; None when all of it was
    cut_text: str = ""  # what was not

    @property
    def count(self) -> str:
        """How much of the text encoder's room the prompt takes; <bos> has the first of the 300 positions."""
        return f"{self.prompt_tokens} of {MAX_TOKENS - 1} tokens"

    @property
    def warning(self) -> str | None:
        """A sentence that says where the prompt was cut, None when it was not."""
        if self.kept_text is None:
            return None
        return (
            f"the prompt has {self.prompt_tokens} tokens, the text encoder takes {MAX_TOKENS - 1}: "
            f'everything after "...{self.kept_text[-40:]}" was left out, from "{self.cut_text[:40]}" on'
        )


class Tokenizer:
    """Gemma's SentencePiece model: text to ids, BOS first. Whatever has no piece becomes UTF-8 byte pieces."""

    def __init__(self, model: bytes):
        """`model` is the content of `tokenizer.model`. Raises ValueError when it is no SentencePiece model with BOS."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"these {len(model)} bytes are not a SentencePiece model (tokenizer.model)") from error
        if self._processor.bos_id() < 0:
            raise ValueError("the SentencePiece model has no <bos> piece, which Gemma needs")
        self.model = model
        self.bos = self._processor.bos_id()
        self.pad = max(self._processor.pad_id(), 0)

    def __len__(self) -> int:
        """Number of pieces, special ones included."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, BOS first."""
        return [self.bos, *self._processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ones leave no trace, and neither does a character cut in the middle."""
        return self._processor.decode(list(ids)).replace("\ufffd", "")

    def tokenize(self, prompt: str, instruction: str = "") -> Tokens:
        """The sequence for a prompt, without the white space around it, after an instruction.

        An empty prompt gets no instruction: BOS and 299 pads, the null caption that the transformer was trained with.
        """
        prompt = prompt.strip()
        instruction = instruction if prompt else ""
        instruction_tokens = len(self.encode(instruction)) if instruction else 0
        length = token_budget(instruction_tokens)
        ids = self.encode(instruction + prompt)
        start = length - MAX_TOKENS + 1  # of the prompt
        kept, cut = ids[:length], ids[length:]
        padding = length - len(kept)
        return Tokens(
            ids=kept + [self.pad] * padding,
            mask=[1] * len(kept) + [0] * padding,
            prompt_tokens=len(ids) - start,
            kept_text=self.decode(kept[start:]).strip() if cut else None,
            cut_text=self.decode(cut).strip(),
        )


class TextEncoder:
    """Gemma-2 (transformers' Gemma2Model) with its tokenizer. `checkpoint.load_text_encoder` makes one."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, hence of the features."""
        return self.model.embed_tokens.weight.dtype

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self.model.config.hidden_size

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the weights; the dtype is chosen on loading, since a cast would also round the rotary frequencies."""
        self.model.to(device)
        return self

    def tokenize(self, prompts: str | Sequence[str], *, chi: bool | str = True) -> list[Tokens]:
        """Tokenize each prompt after the instruction `chi`; see `Tokenizer.tokenize`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return [self.tokenizer.tokenize(prompt, instruction_text(chi)) for prompt in prompts]

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str], *, chi: bool | str = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the prompts, on the encoder's device and in its dtype.

        Prompts pass through as they are, but for white space at the ends: no lower-casing, no cleaning. Use
        `chi=False` for a negative prompt. A prompt over 299 tokens is cut, and a warning says where.

        Returns embeds [B, 300, C], the last hidden states after Gemma's final norm, and mask [B, 300], int64, 1 at
        tokens and 0 at padding. Raises ValueError for float16 weights, in which Gemma-2 overflows.
        """
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"Gemma-2 is in {self.dtype}; it gives wrong features in anything but bfloat16 or float32")
        rows = self.tokenize(prompts, chi=chi)
        for row in rows:
            if row.warning:
                logger.warning("%s", row.warning)
        embeds = torch.empty(len(rows), MAX_TOKENS, self.channels, dtype=self.dtype, device=self.device)
        mask = torch.empty(len(rows), MAX_TOKENS, dtype=torch.long, device=self.device)
        # Empty prompts carry no instruction, so that one call may hold sequences of two lengths.
        for length in {len(row.ids) for row in rows}:
            chosen = [index for index, row in enumerate(rows) if len(row.ids) == length]
            embeds[chosen], mask[chosen] = self._encode_rows([rows[index] for index in chosen], length)
        return embeds, mask

    def _encode_rows(self, rows: list[Tokens], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([row.ids for row in rows], device=self.device)
        mask = torch.tensor([row.mask for row in rows], device=self.device)
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        positions = select_positions(length).to(self.device)
        return hidden[:, positions], mask[:, positions]


class CaptionCache(TextEncoder):
    """A text encoder that encodes a text once, while it is among the last that it was asked for.

    Only for a model whose weights no longer change, such as a command's: the features would not follow them.
    """

    def __init__(self, encoder: TextEncoder, size: int = 32):
        """`size`: texts to remember, of 300 positions each; in bfloat16 a text of Gemma-2-2b takes 1.4 MB."""
        super().__init__(encoder.model, encoder.tokenizer)
        self._size = size
        self._captions: OrderedDict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def to(self, device: torch.device | str) -> "CaptionCache":
        """Move the weights, and forget what was encoded elsewhere."""
        self._captions.clear()
        super().to(device)
        return self

    def encode(self, prompts: str | Sequence[str], *, chi: bool | str = True) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TextEncoder.encode`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        instruction = instruction_text(chi)
        rows = [self._caption(prompt.strip(), instruction) for prompt in prompts]
        embeds, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return embeds, mask

    def _caption(self, prompt: str, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        key = (prompt, instruction if prompt else "")
        caption = self._captions.pop(key, None) or super().encode(prompt, chi=instruction)
        self._captions[key] = caption
        if len(self._captions) > self._size:
            self._captions.popitem(last=False)
        return caption
