"""ComfyUI's VAE around the deep-compression autoencoder."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ..sana_core.checkpoint import config_tensor, load_dc_ae
from ..sana_core.models.dc_ae import DCAE
from .patcher import WholePatcher

log = logging.getLogger(__name__)

_WORKING_DTYPES = (torch.bfloat16, torch.float32)  # float16 overflows in the deep stages and decodes to black
_LIVE_FEATURE_MAPS = 8  # of the widest stage, in a residual block: an estimate with room for workspaces


class SanaVAE(comfy.sd.VAE):
    """A VAE whose latents are those that DCAE makes, unscaled: the MODEL's latent format scales them."""

    def __init__(self, model: DCAE, dtype: torch.dtype | None = None):
        with _Muted("No VAE weights detected"):  # core's constructor has no hook for a model that it does not know
            super().__init__(sd={})
        config = model.config
        compression = config.spatial_compression
        self.latent_channels = config.latent_channels
        self.downscale_ratio = compression
        self.upscale_ratio = compression
        self.working_dtypes = list(_WORKING_DTYPES)
        self.disable_offload = True  # layers of torch.nn cannot be cast while they run, so it is loaded whole
        self.memory_used_encode = lambda shape, dtype: (
            _activation_bytes(config.encoder_channels, config.encoder_depths, dtype) * shape[2] * shape[3]
        )
        self.memory_used_decode = lambda shape, dtype: (
            _activation_bytes(config.decoder_channels, config.decoder_depths, dtype)
            * (shape[2] * shape[3] * compression**2)
        )
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype = _autoencoder_dtype(self.device, dtype)
        self.first_stage_model = model.eval().requires_grad_(False).to(self.vae_dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        self.patcher = WholePatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.model_size()
        log.info("DC-AE runs on %s in %s", self.device, self.vae_dtype)

    def decode(self, samples_in, *args, **kwargs):
        """Latents [B, C, h, w] to pixels [B, H, W, 3] in 0..1. Raises ValueError for NaN, naming whence it came."""
        self._check_latent(samples_in)
        return self._checked_pixels(super().decode(samples_in, *args, **kwargs))

    def decode_tiled(self, samples, *args, **kwargs):
        """As decode, in tiles."""
        self._check_latent(samples)
        return self._checked_pixels(super().decode_tiled(samples, *args, **kwargs))

    def encode(self, pixel_samples):
        """Pixels [B, H, W, 3] in 0..1 to latents [B, C, h, w]; what exceeds the grid is cropped evenly."""
        return self._checked_latent(super().encode(pixel_samples))

    def encode_tiled(self, pixel_samples, *args, **kwargs):
        """As encode, in tiles."""
        return self._checked_latent(super().encode_tiled(pixel_samples, *args, **kwargs))

    def decode_tiled_(self, samples, tile_x=32, tile_y=32, overlap=4):
        """Decode tiles of 1024 px: the attention is global, and smaller tiles show on large flat areas.

        Core would average three passes over tiles of twice the sides; one pass with blended edges is what the
        official code does (tile 1024, stride 896).
        """
        overlap = max(1, min(overlap, tile_x // 2, tile_y // 2))
        steps = samples.shape[0] * comfy.utils.get_tiled_scale_steps(
            samples.shape[3], samples.shape[2], tile_x, tile_y, overlap
        )
        pixels = comfy.utils.tiled_scale(
            samples,
            lambda tile: self._run(self.first_stage_model.decode, tile),
            tile_x,
            tile_y,
            overlap,
            upscale_amount=self.upscale_ratio,
            out_channels=self.output_channels,
            output_device=self.output_device,
            pbar=comfy.utils.ProgressBar(steps),
        )
        return self.process_output(pixels)

    def encode_tiled_(self, pixel_samples, tile_x=1024, tile_y=1024, overlap=128):
        """Encode tiles of 1024 px in one pass. Tiles and overlap are kept on the latent's grid."""
        grid = self.downscale_ratio
        tile_x, tile_y = (max(2, tile // grid) * grid for tile in (tile_x, tile_y))
        overlap = max(1, min(overlap, tile_x // 2, tile_y // 2) // grid) * grid
        steps = pixel_samples.shape[0] * comfy.utils.get_tiled_scale_steps(
            pixel_samples.shape[3], pixel_samples.shape[2], tile_x, tile_y, overlap
        )
        return comfy.utils.tiled_scale(
            pixel_samples,
            lambda tile: self._run(self.first_stage_model.encode, self.process_input(tile)),
            tile_x,
            tile_y,
            overlap,
            upscale_amount=1 / grid,
            out_channels=self.latent_channels,
            output_device=self.output_device,
            pbar=comfy.utils.ProgressBar(steps),
        )

    def get_sd(self):
        """Weights for VAESave, with the configuration, since core drops the file's metadata."""
        return {**super().get_sd(), "sana_config": config_tensor(self.first_stage_model.config)}

    def vae_encode_crop_pixels(self, pixels):
        """Crop [B, H, W, C] evenly to the latent's grid. Raises ValueError for pictures smaller than one position."""
        height, width = pixels.shape[1:3]
        if min(height, width) < self.downscale_ratio:
            raise ValueError(
                f"The picture is {width}x{height} px; the autoencoder needs at least "
                f"{self.downscale_ratio}x{self.downscale_ratio}. Scale it up first."
            )
        return super().vae_encode_crop_pixels(pixels)

    def _run(self, function, tile: torch.Tensor) -> torch.Tensor:
        return function(tile.to(self.device, self.vae_dtype)).to(self.vae_output_dtype())

    def _check_latent(self, latent: torch.Tensor) -> None:
        if latent.shape[1] != self.latent_channels:
            raise ValueError(
                f"The latent has {latent.shape[1]} channels, this autoencoder takes {self.latent_channels}. Sana's "
                "latents come from a sampler with a Sana model, or from Sana DC-AE Encode."
            )
        if not torch.isfinite(latent).all():
            raise ValueError("The latent to decode holds NaN or infinity: it went wrong before the autoencoder.")

    def _checked_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._checked(pixels, "decoder")

    def _checked_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return self._checked(latent, "encoder")

    def _checked(self, result: torch.Tensor, stage: str) -> torch.Tensor:
        if not torch.isfinite(result).all():
            raise ValueError(
                f"The DC-AE {stage} returned NaN or infinity (running in {self.vae_dtype}). Load it with dtype float32."
            )
        return result


def load_vae(path: str | Path, variant: str | None = None, dtype: torch.dtype | None = None) -> SanaVAE:
    """Load a DC-AE file or folder as ComfyUI's VAE; dtype None lets ComfyUI choose between bfloat16 and float32."""
    vae = SanaVAE(load_dc_ae(path, variant=variant), dtype)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path, variant, dtype))
    return vae


def load_vae_patcher(path, variant=None, dtype=None, disable_dynamic=False):
    """A fresh copy from disk, for core's clones onto other devices; it is never dynamic, whatever is asked."""
    return load_vae(path, variant, dtype).patcher


def _autoencoder_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else ComfyUI's choice; never float16."""
    chosen = dtype or comfy.model_management.vae_dtype(device, list(_WORKING_DTYPES))
    if chosen in _WORKING_DTYPES:
        return chosen
    safe = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
    log.warning("DC-AE overflows in %s and gives black pictures; it runs in %s instead", chosen, safe)
    return safe


def _activation_bytes(channels: tuple[int, ...], depths: tuple[int, ...], dtype: torch.dtype) -> float:
    """Estimated peak for each pixel of the picture. The first stage that has blocks holds the largest maps."""
    width = channels[0] if depths[0] > 0 else channels[1] / 4
    return _LIVE_FEATURE_MAPS * width * comfy.model_management.dtype_size(dtype)


class _Muted(logging.Filter):
    """Drops the root logger's messages that hold a text, within a `with` block."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()

    def __enter__(self):
        logging.getLogger().addFilter(self)

    def __exit__(self, *_):
        logging.getLogger().removeFilter(self)
