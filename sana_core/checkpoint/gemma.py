"""The text encoder on disk: Gemma-2's weights and its SentencePiece model, in one file or in a Hugging Face folder."""

import json
import logging
import re
from pathlib import Path

import torch
import transformers
from torch import nn

from ..text import TextEncoder, Tokenizer
from .families import describe_keys, strip_prefix
from .files import CheckpointError, Source, StateDict, locate_weights, read_files, write_safetensors
from .weights import FLOAT8_DTYPES, fill_model, main_dtype, wide_dtype

logger = logging.getLogger(__name__)

CONFIG_KEY = "gemma_config"  # in the metadata of our own files
TOKENIZER_KEY = "spiece_model"  # the bytes of tokenizer.model as a uint8 tensor, as in ComfyUI's files
TOKENIZER_FILE = "tokenizer.model"
ANCHOR = "embed_tokens.weight"
SIGN = "layers.0.post_feedforward_layernorm.weight"  # Gemma-2 has it, Gemma-1 and Llama do not
HEAD_DIM = 256  # of every Gemma-2 that was published


def load_text_encoder(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TextEncoder:
    """Load Gemma-2 with its tokenizer, in eval mode.

    Args:
        path: a file with the tokenizer in it or beside it, a Hugging Face folder, or the folder of a pipeline.
        dtype: bfloat16 or float32; None keeps the file's. Float16 overflows in Gemma-2: asked for or stored, it
            becomes bfloat16, and the log says so.

    Raises:
        CheckpointError: not Gemma-2, damaged, quantised to 8 bits, or without a tokenizer.
    """
    source = locate_weights(path, ("text_encoder",), _file_dtype(dtype))
    state_dict, metadata = read_files(source.files)
    spiece = state_dict.pop(TOKENIZER_KEY, None)
    state_dict = strip_prefix(state_dict, (ANCHOR,))
    _require_gemma(state_dict, source)
    tokenizer = _read_tokenizer(spiece, source)
    config, reason = _detect_config(state_dict, metadata, source)
    dtype = wide_dtype(dtype or main_dtype(state_dict), torch.bfloat16, "Gemma-2", path)
    logger.info("%s: Gemma-2 with %d layers of %d, %s", path, config.num_hidden_layers, config.hidden_size, reason)
    state_dict.pop("lm_head.weight", None)  # predicts the next word, of which there is no use here
    with torch.device("meta"):
        model = transformers.Gemma2Model._from_config(config, attn_implementation="eager")  # sdpa cannot soft-cap
    fill_model(model, state_dict, path, device, dtype)
    _fill_buffers(model, device)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{path} has embeddings for {config.vocab_size} pieces, its tokenizer has {len(tokenizer)}: "
            "they belong to different models."
        )
    return TextEncoder(model, tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a text encoder, without its weights. `path` and errors as above."""
    source = locate_weights(path, ("text_encoder",))
    state_dict, _ = read_files(source.files)  # mapped, not read
    return _read_tokenizer(state_dict.get(TOKENIZER_KEY), source)


def _file_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Float16 weights are never the better ones to read."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _require_gemma(state_dict: StateDict, source: Source) -> None:
    if SIGN not in state_dict:
        raise CheckpointError(
            f"{source.path} is not a Gemma-2 text encoder: {describe_keys(state_dict)}. "
            "Sana needs Gemma-2-2b-it, for example gemma_2_2b_it_elm_bf16.safetensors."
        )
    marks = re.compile(r"scale_weight|weight_scale|quant")
    quantised = [key for key, tensor in state_dict.items() if tensor.dtype in FLOAT8_DTYPES or marks.search(key)]
    if quantised:
        raise CheckpointError(
            f"{source.path} is quantised to 8 bits ({quantised[0]}), which this loader cannot run. Choose the bfloat16 "
            'file, or load this one with ComfyUI\'s own CLIPLoader node, type "pixeldit".'
        )


def _read_tokenizer(spiece: torch.Tensor | None, source: Source) -> Tokenizer:
    origin, content = _tokenizer_bytes(spiece, source)
    try:
        return Tokenizer(content)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}. Download it again.") from error


def _tokenizer_bytes(spiece: torch.Tensor | None, source: Source) -> tuple[str, bytes]:
    if spiece is not None:
        return f"{source.path} ({TOKENIZER_KEY})", bytes(spiece.to(torch.uint8).numpy())
    folders = (source.folder, source.path / "tokenizer", source.folder.parent / "tokenizer")
    for file in (folder / TOKENIZER_FILE for folder in folders):
        if file.is_file():
            return str(file), file.read_bytes()
    raise CheckpointError(
        f"{source.path} has no tokenizer: no tensor {TOKENIZER_KEY} in it and no {TOKENIZER_FILE} in "
        f"{', '.join(map(str, folders))}. Put Gemma's {TOKENIZER_FILE} beside the weights."
    )


def _detect_config(state_dict: StateDict, metadata: dict[str, str], source: Source):
    """transformers' configuration, and where it comes from. Raises CheckpointError if nothing tells the heads."""
    if source.config and source.config.get("model_type") == "gemma2":
        return _build_config(source.config, source), "by config.json"
    if CONFIG_KEY in metadata:
        try:
            values = json.loads(metadata[CONFIG_KEY])
        except ValueError as error:
            raise CheckpointError(f"{source.path}: its {CONFIG_KEY} is damaged ({error}).") from error
        return _build_config(values, source), f"by its own {CONFIG_KEY}"
    return _build_config(_config_of_shapes(state_dict, source), source), "by its shapes"


def _build_config(values: dict, source: Source) -> transformers.Gemma2Config:
    values = {name: value for name, value in values.items() if name not in ("transformers_version", "_name_or_path")}
    try:
        return transformers.Gemma2Config(**values)
    except Exception as error:  # transformers checks with errors of its own and of huggingface_hub
        raise CheckpointError(f"{source.path}: its configuration is not one of Gemma-2 ({error}).") from error


def _config_of_shapes(state_dict: StateDict, source: Source) -> dict:
    layers = [int(match.group(1)) for key in state_dict if (match := re.match(r"layers\.(\d+)\.", key))]
    keys = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    missing = [key for key in keys if f"layers.0.{key}.weight" not in state_dict]
    if missing:
        raise CheckpointError(f"{source.path} lacks layers.0.{missing[0]}.weight. Download it again.")
    queries, keys, intermediate_size = (state_dict[f"layers.0.{key}.weight"].shape[0] for key in keys)
    vocab_size, hidden_size = state_dict[ANCHOR].shape
    if queries % HEAD_DIM or keys % HEAD_DIM:
        raise CheckpointError(
            f"{source.path}: nothing tells the number of heads. Published Gemma-2 models have heads of {HEAD_DIM}, "
            f"this one has {queries} query rows. Put its config.json beside it, in a folder of their own."
        )
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": queries // HEAD_DIM,
        "num_key_value_heads": keys // HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def _fill_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute what no file holds. Built on the meta device, the model has only the shapes of these."""
    model.rotary_emb = type(model.rotary_emb)(config=model.config).to(device)
    if hasattr(model.embed_tokens, "embed_scale"):  # a buffer since transformers 5
        model.embed_tokens.embed_scale = torch.tensor(model.config.hidden_size**0.5, device=device)
    unfilled = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unfilled:
        raise RuntimeError(f"transformers {transformers.__version__} has buffers unknown here: {', '.join(unfilled)}")


def save_text_encoder(encoder: TextEncoder, path: str | Path) -> None:
    """Write one safetensors file with Hugging Face's keys, the tokenizer and the configuration, at once or not at all.

    Raises CheckpointError if the file cannot be written.
    """
    state_dict = {f"model.{key}": tensor for key, tensor in encoder.model.state_dict().items()}
    state_dict[TOKENIZER_KEY] = torch.frombuffer(bytearray(encoder.tokenizer.model), dtype=torch.uint8)
    metadata = {CONFIG_KEY: json.dumps(encoder.model.config.to_diff_dict())}
    write_safetensors(state_dict, path, metadata)
