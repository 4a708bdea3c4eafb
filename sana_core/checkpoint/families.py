"""What a state dict looks like, told by a few of its keys: to find the layout, and to say what a wrong file is."""

import re
from collections.abc import Iterable

from .files import StateDict

# In order: the first whose patterns are all found (at the end or in the middle of some key) names the file.
FAMILIES = (
    ("a LoRA, which adds to a model and is none itself", (r"\.lora_(A|B|up|down)\b",)),
    ("a Sana ControlNet", (r"\bcontrolnet\.0\.before_proj\.weight$",)),
    ("a Sana ControlNet (diffusers layout)", (r"\bcontrolnet_blocks\.0\.weight$", r"\binput_block\.weight$")),
    (
        "a ControlNet for another model",
        (
            r"\bcontrolnet_(cond_embedding|blocks|x_embedder)\.|\b(zero_convs|control_model|nested)\.|\bcontrol_add_embedding\.",
        ),
    ),
    ("a Sana transformer", (r"\bblocks\.0\.mlp\.inverted_conv\.conv\.weight$",)),
    ("a Sana transformer (diffusers layout)", (r"\btransformer_blocks\.0\.ff\.conv_inverted\.weight$",)),
    ("a DC-AE autoencoder", (r"\bencoder\.stages\.\d+\.op_list\.", r"\bdecoder\.project_in\.main\.conv\.weight$")),
    ("a DC-AE autoencoder (diffusers layout)", (r"\bencoder\.down_blocks\.\d+\.\d+\.", r"\bdecoder\.conv_in\.weight$")),
    ("a Gemma-2 text encoder", (r"\blayers\.0\.post_feedforward_layernorm\.weight$",)),
    ("a PixArt model", (r"\bt_block\.1\.weight$", r"\bblocks\.0\.mlp\.fc1\.weight$")),
    ("a PixArt model (diffusers layout)", (r"\badaln_single\.linear\.weight$",)),
    ("an SDXL model", (r"\binput_blocks\.0\.0\.weight$", r"\blabel_emb\.")),
    ("a Stable Diffusion model", (r"\binput_blocks\.0\.0\.weight$",)),
    ("a Stable Diffusion model (diffusers layout)", (r"\bdown_blocks\.0\.resnets\.0\.time_emb_proj\.weight$",)),
    ("a Stable Diffusion 3 model", (r"\bjoint_blocks\.0\.",)),
    ("a Flux model", (r"\bdouble_blocks\.0\.img_attn\.",)),
    ("the autoencoder of another model (8 pixels a latent)", (r"\bencoder\.down(_blocks)?\.0\.(block|resnets)\.0\.",)),
    ("a T5 text encoder", (r"\bencoder\.block\.0\.layer\.0\.SelfAttention\.",)),
    ("a CLIP text encoder", (r"\btext_model\.encoder\.layers\.0\.",)),
    ("a language model other than Gemma-2", (r"\blayers\.0\.self_attn\.q_proj\.weight$",)),
)

# In order, for the keys of a LoRA: the first whose pattern is found in some key names the model that it is for.
LORA_FAMILIES = (
    ("SDXL", r"(down|up|input|output|mid|middle)_blocks?[._].*transformer_blocks[._][1-9]"),
    ("Stable Diffusion 1, 2 or XL", r"(down|up|input|output|mid|middle)_blocks?[._]"),
    ("Flux", r"double_blocks[._]\d|single_(transformer_)?blocks[._]\d"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._](add_|to_)"),
    ("PixArt", r"transformer_blocks[._]\d+[._]ff[._]net|adaln_single"),
    ("a text encoder alone", r"^(lora_te|text_encoder)|text_model"),
)

# What a file that holds a whole pipeline may have beside the model that is asked for.
OTHER_COMPONENTS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "vae.",
    "text_encoder.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
)

TRANSFORMER_ANCHORS = {"official": "x_embedder.proj.weight", "diffusers": "patch_embed.proj.weight"}
TRANSFORMER_SIGNS = {
    "official": r"blocks\.0\.mlp\.inverted_conv\.conv\.weight",
    "diffusers": r"transformer_blocks\.0\.ff\.conv_inverted\.weight",
}
CONTROLNET_ANCHORS = {"official": "controlnet.0.before_proj.weight", "diffusers": "input_block.weight"}
CONTROLNET_SIGNS = {"official": r"controlnet\.0\.before_proj\.weight", "diffusers": r"input_block\.weight"}
DC_AE_ANCHORS = {"official": "decoder.project_in.main.conv.weight", "diffusers": "decoder.norm_out.weight"}
DC_AE_SIGNS = {
    "official": r"encoder\.stages\.\d+\.op_list\..+",
    "diffusers": r"encoder\.down_blocks\.\d+\.\d+\.(conv1?|attn\.to_q)\.weight",
}


def describe_keys(keys: Iterable[str]) -> str:
    """What a file with these keys looks like, as the end of a sentence."""
    keys = list(keys)
    for name, patterns in FAMILIES:
        if all(any(re.search(pattern, key) for key in keys) for pattern in patterns):
            return f"it looks like {name}"
    return f"it has {len(keys)} keys such as {', '.join(keys[:3])}"


def describe_lora(keys: Iterable[str]) -> str:
    """Which model a LoRA with these keys is for, as the end of a sentence."""
    keys = list(keys)
    for name, pattern in LORA_FAMILIES:
        if any(re.search(pattern, key) for key in keys):
            return f"it looks like a LoRA for {name}"
    return f"it looks like a LoRA for another model, with keys such as {', '.join(keys[:3])}"


def find_layout(keys: Iterable[str], signs: dict[str, str]) -> str | None:
    """The layout whose sign is among the keys."""
    keys = list(keys)
    return next((layout for layout, sign in signs.items() if any(re.fullmatch(sign, key) for key in keys)), None)


def strip_prefix(state_dict: StateDict, anchors: Iterable[str]) -> StateDict:
    """Keys without what ComfyUI and others put before them ("model.diffusion_model.", "vae.", ...).

    The prefix is what stands before one of `anchors`. Keys of other components are left out; all the rest stays.
    """
    anchors = tuple(anchors)
    prefixes = [
        key.removesuffix(anchor) for key in state_dict for anchor in anchors if f".{key}".endswith(f".{anchor}")
    ]
    prefix = min(prefixes, key=len, default="")
    if not prefix:
        return state_dict
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in state_dict.items()
        if key.startswith(prefix) or not key.startswith(OTHER_COMPONENTS)
    }
