"""ComfyUI's VAE around the deep-compression autoencoder."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.cli_args import args

from ..sana_core.checkpoint import config_tensor, load_dc_ae
from ..sana_core.kernels import best_kernels
from ..sana_core.models.dc_ae import DCAE
from ..sana_core.models.memory import choose_tile, decode_memory, encode_memory
from ..sana_core.models.tiling import decode_tiled, encode_tiled
from ..sana_core.processor import count_weights, fast_dtype
from .bfloat16 import chooses_for_cpu
from .patcher import WholePatcher

log = logging.getLogger(__name__)

_WORKING_DTYPES = (torch.bfloat16, torch.float32)  # float16 overflows in the deep stages and decodes to black
TILING = ("auto", "always", "never")


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
        self.tiling = "auto"
        self.tile: int | None = None  # positions of the latent a side; None: by the memory that there is
        self.memory_used_encode = lambda shape, dtype: encode_memory(config, *shape[2:4], dtype)
        self.memory_used_decode = lambda shape, dtype: decode_memory(
            config, shape[2] * compression, shape[3] * compression, dtype
        )
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype = _autoencoder_dtype(self.device, dtype, count_weights(model))
        self.first_stage_model = model.eval().requires_grad_(False).to(self.vae_dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        self.patcher = WholePatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.model_size()
        log.info("DC-AE runs on %s in %s", self.device, self.vae_dtype)

    def with_tiling(self, tiling: str, tile_pixels: int = 0) -> "SanaVAE":
        """This VAE, on the same weights, that works in tiles "always", "never", or "auto": when memory is short.

        tile_pixels: a side of the tiles; 0 takes 1024, or less where memory asks for it.
        """
        if tiling not in TILING:
            raise ValueError(f"tiling is {tiling!r}, expected one of {', '.join(TILING)}")
        vae = copy.copy(self)
        vae.tiling = tiling
        vae.tile = max(1, tile_pixels // self.upscale_ratio) if tile_pixels else None
        return vae

    def decode(self, samples_in, *args, **kwargs):
        """Latents [B, C, h, w] to pixels [B, H, W, 3] in 0..1. Raises ValueError for NaN, naming whence it came."""
        samples_in = self._checked_input(samples_in)
        if self._must_tile(self.memory_used_decode(samples_in.shape, self.vae_dtype)):
            return self.decode_tiled(samples_in)
        return self._checked_pixels(super().decode(samples_in, *args, **kwargs))

    def decode_tiled(self, samples, tile_x=None, tile_y=None, **_overlap):
        """As decode, in tiles of that many latent positions. The result is the whole's, whatever overlap is asked."""
        samples = self._checked_input(samples)
        memory = self._decode_memory(samples)
        tile = _smaller(tile_x, tile_y) or self.tile or self._fitting_tile(memory, self._obtainable())
        self._load(memory(tile))
        with comfy.model_management.cuda_device_context(self.device):
            pixels = self.decode_tiled_(samples, tile, tile)
        return self._checked_pixels(pixels.movedim(1, -1))

    def decode_tiled_(self, samples, tile_x=None, tile_y=None, **_overlap):
        """Latents [B, C, h, w] to pixels [B, 3, H, W] in 0..1. Core calls it when the whole ran out of memory."""
        tile = _smaller(tile_x, tile_y) or self._fallback_tile(self._decode_memory(samples))
        return self.process_output(self._in_tiles(decode_tiled, samples, tile))

    def encode(self, pixel_samples):
        """Pixels [B, H, W, 3] in 0..1 to latents [B, C, h, w]; what exceeds the grid is cropped evenly."""
        if self._must_tile(self.memory_used_encode(pixel_samples.movedim(-1, 1).shape, self.vae_dtype)):
            return self.encode_tiled(pixel_samples)
        return self._checked_latent(super().encode(pixel_samples))

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, **_overlap):
        """As encode, in tiles of that many pixels. The result is the whole's, whatever overlap is asked."""
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        memory = self._encode_memory(pixels)
        tile = self._positions(tile_x, tile_y) or self.tile or self._fitting_tile(memory, self._obtainable())
        self._load(memory(tile))
        with comfy.model_management.cuda_device_context(self.device):
            side = tile * self.downscale_ratio
            return self._checked_latent(self.encode_tiled_(pixels, side, side))

    def encode_tiled_(self, pixel_samples, tile_x=None, tile_y=None, **_overlap):
        """Pixels [B, 3, H, W] in 0..1 to latents [B, C, h, w]. Core calls it when the whole ran out of memory."""
        tile = self._positions(tile_x, tile_y) or self._fallback_tile(self._encode_memory(pixel_samples))
        return self._in_tiles(
            lambda model, x, *rest: encode_tiled(model, self.process_input(x), *rest), pixel_samples, tile
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

    def _decode_memory(self, latent: torch.Tensor) -> Callable[[int], int]:
        """Bytes to decode one of the latents [B, C, h, w], for a tile."""
        height, width = (side * self.upscale_ratio for side in latent.shape[2:])
        return partial(decode_memory, self.first_stage_model.config, height, width, self.vae_dtype)

    def _encode_memory(self, pixels: torch.Tensor) -> Callable[[int], int]:
        """Bytes to encode one of the pictures [B, 3, H, W], for a tile."""
        return partial(encode_memory, self.first_stage_model.config, *pixels.shape[2:], self.vae_dtype)

    def _must_tile(self, whole: int) -> bool:
        """Whether to work in tiles, if the whole takes this many bytes."""
        if self.tiling != "auto":
            return self.tiling == "always"
        return whole > self._obtainable()

    def _obtainable(self) -> int:
        """Bytes for feature maps once all other models have left the GPU; on a CPU, where they cannot, what is free."""
        if comfy.model_management.is_device_cpu(self.device):
            return comfy.model_management.get_free_memory(self.device)
        total = comfy.model_management.get_total_memory(self.device)
        return int(total - comfy.model_management.extra_reserved_memory() - self.model_size())

    def _fitting_tile(self, memory: Callable[[int], int], available: int) -> int:
        return choose_tile(self.first_stage_model.config, memory, available)

    def _fallback_tile(self, memory: Callable[[int], int]) -> int:
        """Tile for what is free now that the whole ran out of memory. Raises MemoryError if tiles are not wanted."""
        if self.tiling == "never":
            raise MemoryError(
                "The DC-AE ran out of memory on the whole picture, and tiling is set to never. "
                "Set it to auto: tiles give the same picture in less memory."
            )
        return self.tile or self._fitting_tile(memory, comfy.model_management.get_free_memory(self.device))

    def _positions(self, *sides: int | None) -> int | None:
        """Latent positions a side of a tile in pixels."""
        side = _smaller(*sides)
        return side and max(1, side // self.downscale_ratio)

    def _load(self, memory: int) -> None:
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=memory, force_full_load=self.disable_offload
        )

    def _in_tiles(self, function, batch: torch.Tensor, tile: int) -> torch.Tensor:
        """Results of a tiled function of the model for each of a batch [B, C, h, w], one after the other."""
        log.info("DC-AE works in tiles of %d pixels a side", tile * self.upscale_ratio)
        bar = comfy.utils.ProgressBar(1)
        results = []
        for picture in batch.split(1):

            def progress(done: int, total: int) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(len(results) * total + done, len(batch) * total)

            result = function(self.first_stage_model, picture.to(self.device, self.vae_dtype), tile, progress)
            results.append(result.to(self.output_device, self.vae_output_dtype()))
        return torch.cat(results)

    def _checked_input(self, latent: torch.Tensor) -> torch.Tensor:
        if latent.ndim == 5:
            latent = latent[:, :, 0]  # a video, [B, C, frames, h, w]: its first frame, as in core's VAEs for pictures
        if latent.shape[1] != self.latent_channels:
            raise ValueError(
                f"The latent has {latent.shape[1]} channels, this autoencoder takes {self.latent_channels}. Sana's "
                "latents come from a sampler with a Sana model, or from Sana DC-AE Encode."
            )
        if not torch.isfinite(latent).all():
            raise ValueError("The latent to decode holds NaN or infinity: it went wrong before the autoencoder.")
        return latent

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
    kernels = best_kernels(comfy.model_management.vae_device())
    vae = SanaVAE(load_dc_ae(path, variant=variant, kernels=kernels), dtype)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path, variant, dtype))
    return vae


def load_vae_patcher(path, variant=None, dtype=None, disable_dynamic=False):
    """A fresh copy from disk, for core's clones onto other devices; it is never dynamic, whatever is asked."""
    return load_vae(path, variant, dtype).patcher


def _autoencoder_dtype(device: torch.device, dtype: torch.dtype | None, weights: int) -> torch.dtype:
    """The dtype asked for, else ComfyUI's choice; never float16."""
    chosen = dtype or comfy.model_management.vae_dtype(device, list(_WORKING_DTYPES))
    if dtype is None and chooses_for_cpu(device, chosen, args.fp32_vae):
        return fast_dtype(weights)
    if chosen in _WORKING_DTYPES:
        return chosen
    safe = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
    log.warning("DC-AE overflows in %s and gives black pictures; it runs in %s instead", chosen, safe)
    return safe


def _smaller(*sides: int | None) -> int | None:
    """The smaller of the sides that are given, None if none is."""
    return min((side for side in sides if side is not None), default=None)


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
