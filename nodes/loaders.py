"""Files to ComfyUI's own MODEL, CLIP and VAE."""

import torch
from comfy_api.latest import io

from ..sana_core.config import AUTOENCODERS, TRANSFORMERS
from .adapter import load_model
from .clip import load_clip
from .model_files import find_model, list_models
from .vae import load_vae

AUTO = "auto"
_DTYPES = {
    AUTO: None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_GRAPHS = {AUTO: None, "on": True, "off": False}
_WIDE = [AUTO, "bfloat16", "float32"]  # Gemma-2 and DC-AE overflow in float16


def _variant(value: str) -> str | None:
    return None if value == AUTO else value


class SanaDiffusionModelLoader(io.ComfyNode):
    """Transformer file to MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDiffusionModelLoader",
            display_name="Load Sana Model",
            category="sana/loaders",
            description="Loads a Sana transformer: official .pth or .safetensors, or a diffusers file or folder.",
            search_aliases=["load diffusion model", "unet loader", "sana checkpoint", "sana transformer"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_models("diffusion_models"),
                    tooltip="File, or folder with a config.json, in models/diffusion_models. sana_nano comes with the "
                    "pack.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *TRANSFORMERS],
                    default=AUTO,
                    optional=True,
                    tooltip="Which published model the file is. auto recognises it by its name, shapes and metadata; "
                    "choose one for a file that was renamed, such as a 2K or 4K model.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(_DTYPES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Number format of the weights. auto is the one that the model was trained in, on a CPU "
                    "float32 unless bfloat16 is fast there. float16 is only for models that were trained in it; fp8 "
                    "halves the memory and costs quality, fp8_e5m2 more than fp8_e4m3fn.",
                ),
                io.Combo.Input(
                    "cuda_graph",
                    options=list(_GRAPHS),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="On an NVIDIA GPU, records a sampling step once and repeats it as a CUDA graph: the same "
                    "picture, sooner, for some memory. auto does so where ComfyUI leaves the weights in place; on also "
                    "loads this model without ComfyUI's dynamic VRAM, which moves them; off never does.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="For Sana Sampler, KSampler and others.")],
        )

    @classmethod
    def execute(cls, model_name, variant=AUTO, dtype=AUTO, cuda_graph=AUTO) -> io.NodeOutput:
        """The MODEL. Raises CheckpointError for a wrong file."""
        path = find_model("diffusion_models", model_name)
        return io.NodeOutput(load_model(path, _variant(variant), _DTYPES[dtype], _GRAPHS[cuda_graph]))


class SanaTextEncoderLoader(io.ComfyNode):
    """Gemma-2 file to CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaTextEncoderLoader",
            display_name="Load Sana Text Encoder",
            category="sana/loaders",
            description="Loads Gemma-2, which reads the prompt for every Sana model, as Google trained it: with "
            "attention soft-capping.",
            search_aliases=["clip loader", "gemma loader", "load clip", "gemma-2-2b-it"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=list_models("text_encoders"),
                    tooltip="In models/text_encoders: one file with its tokenizer inside (gemma_2_2b_it_elm_bf16), or "
                    "a Hugging Face folder with config.json and tokenizer.model.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=_WIDE,
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Number format of the weights. Gemma-2-2b takes 5.2 GB in bfloat16 and 10.5 GB in float32, "
                    "loaded whole. float16 overflows and is not offered.",
                ),
            ],
            outputs=[io.Clip.Output("clip", display_name="CLIP", tooltip="For Sana Prompt Encode, CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, text_encoder_name, dtype=AUTO) -> io.NodeOutput:
        """The CLIP. Raises CheckpointError for a wrong file."""
        return io.NodeOutput(load_clip(find_model("text_encoders", text_encoder_name), _DTYPES[dtype]))


class SanaDCAELoader(io.ComfyNode):
    """Autoencoder file to VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDCAELoader",
            display_name="Load Sana DC-AE",
            category="sana/loaders",
            description="Loads a deep-compression autoencoder, which turns Sana's latents into pictures and back.",
            search_aliases=["vae loader", "load vae", "dc-ae", "deep compression autoencoder"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=list_models("vae"),
                    tooltip="File, or folder with a config.json, in models/vae: dc-ae-f32c32-sana-1.0 or -1.1, or the "
                    "smaller dc-ae-lite. dc_ae_nano comes with the pack.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *AUTOENCODERS],
                    default=AUTO,
                    optional=True,
                    tooltip="Which published autoencoder the file is. auto recognises it.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=_WIDE,
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Number format to run in. auto is bfloat16 on a GPU that has it. float16 gives black "
                    "pictures and is not offered.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="VAE", tooltip="For Sana DC-AE Decode, VAE Decode and others.")],
        )

    @classmethod
    def execute(cls, vae_name, variant=AUTO, dtype=AUTO) -> io.NodeOutput:
        """The VAE. Raises CheckpointError for a wrong file."""
        return io.NodeOutput(load_vae(find_model("vae", vae_name), _variant(variant), _DTYPES[dtype]))
