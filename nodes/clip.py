"""ComfyUI's CLIP around the Gemma-2 text encoder."""

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.sd
import torch

from ..sana_core.checkpoint import load_text_encoder
from ..sana_core.processor import fast_dtype
from ..sana_core.text import TextEncoder, Tokenizer
from .patcher import WholePatcher

log = logging.getLogger(__name__)

_SAFE_DTYPES = (torch.bfloat16, torch.float32)  # float16 overflows in Gemma-2
_SEQUENCE = 640  # tokens of the official instruction and a full prompt, about
_KEY = "gemma2"


@dataclass(frozen=True)
class Prompt:
    """What ComfyUI hands from tokenizing to encoding: the text itself, since its instruction decides the tokens."""

    text: str
    chi: bool | str


class PromptTokenizer:
    """The tokenizer of a CLIP object. Prompt weights and embeddings have no meaning here: text passes unchanged."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, *, chi: bool | str = True, **_):
        """Tokens for `clip.encode_from_tokens`. Stock nodes give no `chi`: a text then gets the official instruction,
        and an empty text none, which is the null caption."""
        return {_KEY: [Prompt(text, chi)]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The SentencePiece model, under the key that core's own Gemma files use."""
        return {"spiece_model": torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)}


class GemmaEncoder(torch.nn.Module):
    """The model of a CLIP object."""

    disable_offload = True  # layers of torch.nn cannot be cast while they run, so it is loaded whole

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.transformer = encoder.model
        self.encoder = encoder
        self.dtypes = {encoder.dtype}

    def set_clip_options(self, options: dict) -> None:
        """Part of ComfyUI's protocol. Nothing applies: Sana takes the last layer, on the device of the weights."""

    def reset_clip_options(self) -> None:
        """Part of ComfyUI's protocol."""

    def memory_estimation_function(self, tokens, device=None) -> float:
        """Bytes that encoding needs beside the weights, about: one layer's activations and attention scores."""
        config = self.transformer.config
        width = 8 * config.hidden_size + 3 * config.intermediate_size
        scores = 3 * config.num_attention_heads * _SEQUENCE
        return 4 * _SEQUENCE * (width + scores)

    def encode_token_weights(self, tokens: dict[str, list[Prompt]]):
        """Encode tokens of `PromptTokenizer`.

        Returns float32 features [B, 300, C], no pooled output, and `attention_mask` [B, 300] for the conditioning.
        Raises ValueError for tokens of another text encoder, and for NaN.
        """
        if _KEY not in tokens:
            raise ValueError(f"These tokens are for {', '.join(tokens)}, not for Gemma-2: they come from another CLIP.")
        rows = [self.encoder.encode(prompt.text, chi=prompt.chi) for prompt in tokens[_KEY]]
        embeds, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
        if not torch.isfinite(embeds).all():
            raise ValueError(
                f"The text encoder returned NaN or infinity (running in {self.encoder.dtype}). Load it with dtype "
                "float32; if that does not help, the file is damaged."
            )
        target = comfy.model_management.intermediate_device()
        return embeds.to(target, torch.float32), None, {"attention_mask": mask.to(target)}


def load_clip(path: str | Path, dtype: torch.dtype | None = None) -> comfy.sd.CLIP:
    """Load a Gemma-2 file or folder as ComfyUI's CLIP; dtype None picks bfloat16 or float32 for the device."""
    device = comfy.model_management.text_encoder_device()
    encoder = load_text_encoder(path, device="cpu", dtype=_encoder_dtype(Path(path), device, dtype))
    encoder.model.requires_grad_(False)
    model = GemmaEncoder(encoder)
    # Core's constructor would choose a patcher that may load the model in part; the attributes are those it sets.
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = model
    clip.tokenizer = PromptTokenizer(encoder.tokenizer)
    clip.patcher = WholePatcher(
        model, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.patcher.cached_patcher_init = (load_clip_patcher, (path, dtype))
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    comfy.model_management.archive_model_dtypes(model)
    log.info("Gemma-2 runs on %s in %s, loaded whole: %d MiB", device, encoder.dtype, clip.patcher.model_size() >> 20)
    return clip


def load_clip_patcher(path, dtype=None, disable_dynamic=False):
    """A fresh copy from disk, for core's clones onto other devices; it is never dynamic, whatever is asked."""
    return load_clip(path, dtype).patcher


def _encoder_dtype(path: Path, device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else that of ComfyUI's options, else the fast one that fits; never float16."""
    if dtype is not None:
        return dtype
    configured = comfy.model_management.text_encoder_dtype(device)
    if configured in _SAFE_DTYPES:
        return configured
    chosen = torch.bfloat16 if _prefers_bfloat16(path, device) else torch.float32
    log.info("Gemma-2 overflows in %s, ComfyUI's choice for text encoders; it runs in %s instead", configured, chosen)
    return chosen


def _prefers_bfloat16(path: Path, device: torch.device) -> bool:
    """Where the hardware multiplies it; on a CPU where float32 is faster, only if float32 would not fit."""
    if not comfy.model_management.is_device_cpu(device):
        return comfy.model_management.should_use_bf16(device)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    weights = sum(file.stat().st_size for file in files) // torch.bfloat16.itemsize
    if fast_dtype(weights) == torch.bfloat16:
        return True
    as_float32 = weights * torch.float32.itemsize
    return as_float32 > 0.8 * comfy.model_management.get_free_memory(device)
