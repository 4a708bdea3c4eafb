"""ComfyUI's CONTROL_NET around the Sana ControlNet: the hint, when it counts, loading.

The branch runs within the transformer, since the authors start it behind the transformer's first block. So get_control
computes no residuals: it hands over the branch with what it needs, and the MODEL does the rest.
"""

import copy
from pathlib import Path

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from torch import Tensor
from torch.nn.functional import interpolate

from ..sana_core.checkpoint import check_weights, read_controlnet
from ..sana_core.config import SanaConfig
from ..sana_core.models.controlnet import Control, SanaControlNet
from .adapter import CONTROL, SanaLatent, SanaModel, SanaModelConfig
from .hooks import Hooks


class ComfyControlNet(SanaControlNet):
    """The branch with ComfyUI's layers and attention backends. It computes in the dtype of what it is given."""

    def __init__(self, config: SanaConfig, *, device=None, dtype=None):
        hooks = Hooks()
        operations = comfy.ops.manual_cast
        super().__init__(config, device=device, dtype=dtype, operations=operations, kernels=hooks.kernels)
        self.hooks = hooks


class SanaControl(comfy.controlnet.ControlBase):
    """The CONTROL_NET: one use of a branch, with its picture, strength and part of the schedule."""

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher):
        super().__init__()
        self.patcher = patcher
        self.latent_format = SanaLatent("dc-ae-f32c32-sana")  # tells core that the picture is to be encoded
        self.compression_ratio = 1  # of the picture to the latent, apart from what the VAE does

    def set_cond_hint(self, cond_hint, strength=1.0, timestep_percent_range=(0.0, 1.0), vae=None, extra_concat=()):
        """Take the picture [B, C, H, W] in 0..1. Raises ValueError without a VAE, or with another model's."""
        if vae is None:
            raise ValueError(
                "Sana's ControlNet reads the picture as a latent and no VAE is connected. Connect Load Sana DC-AE to "
                "the vae input of the node that applies the ControlNet."
            )
        if vae.latent_channels != self.latent_format.latent_channels:
            raise ValueError(
                f"The VAE of the ControlNet makes latents of {vae.latent_channels} channels, Sana's have "
                f"{self.latent_format.latent_channels}. Connect Load Sana DC-AE to the vae input."
            )
        return super().set_cond_hint(cond_hint, strength, timestep_percent_range, vae, list(extra_concat))

    def pre_run(self, model, percent_to_timestep_function):
        """Core calls it before sampling. Raises ValueError for a MODEL, or a chained ControlNet, that is no Sana."""
        if not isinstance(model, SanaModel):
            raise ValueError(
                f"The ControlNet is Sana's and the model is a {type(model).__name__}. Connect one from Load Sana "
                "Model, or a ControlNet that was made for this model."
            )
        if not isinstance(self.previous_controlnet, SanaControl | None):
            raise ValueError(
                "A ControlNet for another model is chained with Sana's. Load both with Load Sana ControlNet."
            )
        super().pre_run(model, percent_to_timestep_function)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options) -> dict | None:
        """What applies to latents x [B, C, h, w] at levels t [B]: the Controls of the chain, under CONTROL."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        first, last = self.timestep_range
        everywhere = self.timestep_percent_range == (0.0, 1.0)  # then no step waits for the level to come from a GPU
        if not (everywhere or last <= t[0] <= first):
            return previous
        hint = comfy.controlnet.broadcast_image_to(self._encoded_hint(x_noisy), len(x_noisy), batched_number)
        own = Control(self.patcher.model, hint, self.strength)
        return {CONTROL: (*(previous or {CONTROL: ()})[CONTROL], own)}

    def _encoded_hint(self, x: Tensor) -> Tensor:
        """The picture as a scaled latent [., C, h, w] of the size of x, encoded once for each size."""
        if self.cond_hint is None or self.cond_hint.shape[2:] != x.shape[2:]:
            ratio = self.vae.spacial_compression_encode()
            pixels = fit(to_rgb(self.cond_hint_original), *(side * ratio for side in x.shape[2:]))
            sampling = comfy.model_management.loaded_models(only_currently_used=True)
            latent = self.vae.encode(pixels.movedim(1, -1))
            comfy.model_management.load_models_gpu(sampling)  # the VAE may have taken their place
            self.cond_hint = self.latent_format.process_in(latent).to(x.device)
        return self.cond_hint

    def get_models(self) -> list:
        """What core shall load for sampling."""
        return [*super().get_models(), self.patcher]

    def copy(self) -> "SanaControl":
        """Another use of the same weights."""
        control = SanaControl(self.patcher)
        self.copy_to(control)
        return control

    def deepclone_multigpu(self, load_device, autoregister=False) -> "SanaControl":
        """This use with weights of its own on another device."""
        offload_device = comfy.model_management.unet_offload_device()
        control = self.copy()
        control.patcher = comfy.model_patcher.ModelPatcher(
            copy.deepcopy(self.patcher.model), load_device=load_device, offload_device=offload_device
        )
        if autoregister:
            self.multigpu_clones[load_device] = control
        return control


def to_rgb(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] of pictures in colour or grey, [B, 1 to 4, H, W]; transparency is left out."""
    colour = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return colour.expand(-1, 3, -1, -1)


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels [B, C, H, W] scaled to fill the size, by the filter of the official code; what exceeds it is cut evenly.

    Core's common_upscale would thin out the lines of an edge map, as it leaves out pixels when it scales down.
    """
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    for axis, side in ((2, height), (3, width)):
        kept = max(1, min(round(side / scale), pixels.shape[axis]))
        pixels = pixels.narrow(axis, (pixels.shape[axis] - kept) // 2, kept)
    return interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def load_control(path: str | Path) -> SanaControl:
    """Load a Sana ControlNet, a file or a folder, as ComfyUI's CONTROL_NET. Raises CheckpointError for a wrong file."""
    config, state_dict = read_controlnet(path)
    expected = SanaControlNet(config, device="meta").state_dict()
    check_weights(state_dict, {key: tuple(tensor.shape) for key, tensor in expected.items()}, path)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=SanaModelConfig(config).supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )
    net = ComfyControlNet(config, device=offload_device, dtype=dtype).eval()
    patcher = comfy.model_patcher.CoreModelPatcher(net, load_device=load_device, offload_device=offload_device)
    net.load_state_dict(state_dict, strict=False, assign=patcher.is_dynamic())  # checked above
    return SanaControl(patcher)
