"""ComfyUI's MODEL, VAE and CLIP as what the trainer needs: plain networks, in memory one after the other."""

from functools import partial
from pathlib import Path

import comfy.model_management
import torch

from ..sana_core.autoencoder import decode_latents
from ..sana_core.checkpoint.quantization import dequantize
from ..sana_core.checkpoint.weights import fill_model
from ..sana_core.models.sana import SanaTransformer
from ..sana_core.text import TextEncoder
from ..sana_core.training.cache import Cache
from ..sana_core.training.dataset import Dataset
from ..sana_core.training.encoders import latent_encoder, text_feature_encoder
from ..sana_core.training.samples import Samples
from .clip import GemmaEncoder
from .vae import SanaVAE

_PREFIX = "diffusion_model."


def check_parts(model, vae, clip) -> None:
    """Raises ValueError for objects that are not the pack's own, of which the trainer knows how to train nothing."""
    parts = (
        (model.model.diffusion_model, SanaTransformer, "model", "Load Sana Model"),
        (vae, SanaVAE, "vae", "Load Sana DC-AE"),
        (clip.cond_stage_model, GemmaEncoder, "clip", "Load Sana Text Encoder"),
    )
    for found, expected, name, loader in parts:
        if not isinstance(found, expected):
            raise ValueError(f"The {name} is a {type(found).__name__}, which cannot be trained with. Connect {loader}.")


def encode_dataset(dataset: Dataset, prompts: list[str], vae: SanaVAE, clip, folder: Path, on_progress):
    """The filled cache, what is in it, and the prompts with what draws them."""
    comfy.model_management.load_models_gpu([clip.patcher, vae.patcher])
    encoder: TextEncoder = clip.cond_stage_model.encoder
    with torch.inference_mode(False):
        cache = Cache(folder, latent_encoder(vae.first_stage_model), text_feature_encoder(encoder))
        samples, _ = cache.fill(dataset, on_progress)
        pictures = Samples(prompts, encoder, vae.first_stage_model, dataset.base, partial(_decode, vae))
    return cache, samples, pictures


def trainable_copy(model, dtype: torch.dtype) -> SanaTransformer:
    """A network of torch.nn layers with the MODEL's weights and all that was patched into them, alone on the device.

    Its tensors are new, and none is of inference mode: ComfyUI's own can neither be trained nor be used beside what is.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([model])
    network = model.model.diffusion_model
    lazy = model.model_state_dict_for_saving(network, _PREFIX)
    weights = {name: tensor.to("cpu") for name, tensor in lazy.items()}
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False):
        weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        dequantize(weights, "the MODEL")
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        plain = SanaTransformer(network.config, device="meta", dtype=dtype)
        return fill_model(plain, weights, "the MODEL", device, dtype)


def _decode(vae: SanaVAE, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([vae.patcher])
        return decode_latents(vae.first_stage_model, latents)
