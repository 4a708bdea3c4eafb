"""A prompt becomes a picture, without ComfyUI: text encoder, transformer under a sampler, autoencoder."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .autoencoder import decode_latents
from .captions import Captions
from .checkpoint import Lora, load_controlnet, load_dc_ae, load_text_encoder, load_transformer, read_lora, read_shift
from .finite import require_finite
from .hub import fetch_model
from .kernels import best_kernels
from .models.controlnet import Control, SanaControlNet
from .models.graph import GraphedCalls
from .models.lora import apply_lora
from .models.packing import PackedCalls
from .pictures import to_pictures
from .processor import count_weights, early_dtype, fast_dtype
from .resolution import check_size
from .sampler import scm
from .sampler.flow import SAMPLERS
from .sampler.guidance import PAG_OFF
from .sampler.schedule import SCHEDULES, partial_schedule
from .sampling import FlowSampling, SprintSampling, draw_noise
from .source import Pictures, Source, encode_pictures, prepare_source

logger = logging.getLogger(__name__)


class SanaPipeline:
    """The three networks and the official way to sample them: SCM for Sana-Sprint, flow samplers for all others.

    `from_files` and `from_pretrained` load them.
    """

    def __init__(
        self,
        transformer,
        vae,
        text_encoder,
        *,
        shift: float | None = None,
        controlnet: SanaControlNet | None = None,
        cuda_graph: bool = True,
    ):
        """`shift` of the flow schedule; None takes the transformer's own. Raises ValueError if the parts don't fit.

        cuda_graph: repeat the transformer's calls from CUDA graphs where that is safe: the same pictures, sooner.
        """
        self.transformer = transformer
        calls = PackedCalls(transformer)
        self._call = GraphedCalls(transformer, calls) if cuda_graph else calls
        self.vae = vae
        self.text_encoder = text_encoder
        self.shift = transformer.config.shift if shift is None else shift
        self.controlnet = controlnet
        self._check_parts()

    @classmethod
    def from_files(
        cls,
        *,
        transformer: str | Path,
        vae: str | Path,
        text_encoder: str | Path,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        shift: float | None = None,
        cuda_graph: bool = True,
    ) -> "SanaPipeline":
        """Load each network from a file or a folder.

        variant: name of the transformer's preset, where the file alone cannot tell.
        device: None takes the GPU if there is one.
        dtype: of the weights; None takes what the transformer was trained in and the other files' own; on a CPU float32
            for all, or bfloat16 if the transformer is large and was trained in it and the CPU has AMX.
            Autoencoder and text encoder overflow in float16 and get a wider type.
        Raises FileNotFoundError for what is missing, CheckpointError for a wrong file.
        """
        _require_paths(transformer=transformer, vae=vae, text_encoder=text_encoder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = early_dtype(device, dtype)
        network = _load_transformer(transformer, variant, device, dtype)
        if device.type == "cpu":
            dtype = dtype or network.dtype
        return cls(
            network,
            load_dc_ae(vae, device=device, dtype=dtype),
            load_text_encoder(text_encoder, device=device, dtype=dtype),
            shift=shift,
            cuda_graph=cuda_graph,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        cuda_graph: bool = True,
    ) -> "SanaPipeline":
        """Load a folder in the diffusers layout: transformer/, vae/, text_encoder/; scheduler/, controlnet/ if present.

        Or a published model by its name or repository, such as Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers:
        what is not on the disk yet is downloaded, see `hub.fetch_model`. No other repository is.
        Arguments and errors are those of `from_files`; DownloadError for what stops a download.
        """
        options = {"variant": variant, "device": device, "dtype": dtype, "cuda_graph": cuda_graph}
        if not Path(folder).is_dir():
            return cls.from_files(**_published_files(str(folder)), **options)
        folder = Path(folder)
        parts = {name: folder / name for name in ("transformer", "vae", "text_encoder")}
        pipe = cls.from_files(**parts, **options, shift=read_shift(folder))
        if (folder / "controlnet").is_dir():
            pipe.load_controlnet(folder / "controlnet")
        return pipe

    def load_lora(self, path: str | Path, strength: float = 1.0) -> Lora:
        """Add a LoRA file, of any trainer's spelling, to the transformer's weights; several add up.

        Returns what was read of it, whose `unmatched` keys the model has nothing for.
        Raises CheckpointError for a file that is no LoRA for this model, ValueError for a strength that is not finite.
        """
        lora = read_lora(path, self.transformer.config)
        apply_lora(self.transformer, lora.layers, strength)
        logger.log(logging.WARNING if lora.unmatched else logging.INFO, "%s: %s", path, lora.summary)
        return lora

    def load_controlnet(self, path: str | Path) -> None:
        """Load a ControlNet, a file or a folder, for drawings that follow a control_image. It replaces an earlier one.

        Raises CheckpointError for a file that is no Sana ControlNet, ValueError for one of another model.
        """
        controlnet = load_controlnet(path, device=self.device, dtype=self.transformer.dtype)
        controlnet.check_model(self.transformer.config)
        self.controlnet = controlnet

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.5,
        pag_guidance_scale: float = PAG_OFF,
        pag_applied_layers: int | Sequence[int] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str = "flow_dpm-solver",
        shift: float | None = None,
        complex_human_instruction: bool | str = True,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float | None = None,
        control_image: Pictures | None = None,
        control_strength: float = 1.0,
        timesteps: Sequence[float] | None = None,
        output_type: str = "pil",
        vae_tiling: bool | None = None,
        callback: Callable[[dict], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Draw one picture for each prompt.

        negative_prompt: what to keep away from, one for all or one each; unused at guidance_scale 1. Not for Sprint.
        height, width: pixels, multiples of the autoencoder's compression; None takes the model's own size.
        num_inference_steps: None takes `default_steps`.
        guidance_scale: how closely to follow the prompt. An input of Sprint's network, which costs no time.
        pag_guidance_scale: of perturbed-attention guidance, which needs a scale above 1; official Sana has used 2.
        pag_applied_layers: blocks of the transformer that it perturbs; None takes the model's own.
        guidance_interval: noise levels (low, high), of 0 to 1 and after the shift, between which guidance_scale
            counts; outside only the prompt is asked. Ignored with perturbed-attention guidance, as official Sana does.
        sampler: "flow_dpm-solver" or "flow_euler", each on its official schedule. Sprint has its own.
        shift: of the schedule; None takes the model's. Not for Sprint, and neither are PAG and the interval.
        complex_human_instruction: True puts the official text before the prompt, a string replaces it, False omits it.
        prompt_embeds, prompt_mask: text features [B, L, C] and mask [B, L] instead of a prompt.
        seed, generator: where the noise comes from; with neither it is different each time.
        latents: the noise itself [B, C, h, w], unit deviation. Sprint's later steps take theirs from seed or generator.
        image: what to start from, one for all or one each: pictures, which are scaled and cut to the size, pixels as
            "pt" gives them, or latents as "latent" gives them.
        mask: what of the image to draw anew: pictures, white for yes, or a tensor [B, 1, H, W] in 0..1. Latents have 32
            pixels a position, which is drawn whole; of "pil" and "pt" the mask then keeps what it does not cover.
        strength: the share of the steps, rounded up, that the image is put through: of 2 steps, 0.5 leaves one. None
            takes 0.5, and 1 under a mask.
        control_image: what the ControlNet shall follow, given like image; None draws without it.
        control_strength: how strictly; 1 is what it was trained for, 0 no control.
        timesteps: angles of the steps, falling from at most 1.5708 to 0; the first one says how much of an image goes.
            Sprint only.
        output_type: "pil"; "pt" for pixels [B, 3, H, W] in 0..1; "latent" for latents, scaled to unit deviation.
        vae_tiling: decode in tiles, which gives the same picture in less memory; None does so when memory is short.
        callback: called before each step with a dict of x, i, sigma, sigma_hat and denoised.

        Raises ValueError for arguments that do not fit, FloatingPointError, with the stage, for NaN or infinity.
        """
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f'output_type is {output_type!r}, expected "pil", "pt" or "latent"')
        if image is None and not (mask is None and strength is None):
            raise ValueError("mask or strength given without an image: name the image that they are about")
        if control_image is not None and self.controlnet is None:
            raise ValueError("control_image given, but there is no ControlNet to read it: use load_controlnet first")
        if strength is None:
            strength = 0.5 if image is not None and mask is None else 1.0
        if self.is_sprint:
            pag = pag_guidance_scale if pag_guidance_scale > PAG_OFF else None
            refused = {"negative_prompt": negative_prompt or None, "shift": shift, "pag_guidance_scale": pag}
            refused |= {"pag_applied_layers": pag_applied_layers, "guidance_interval": guidance_interval}
            _refuse("Sana-Sprint", **refused)
            generator = self._noise_source(generator, seed)
            sigmas = scm.get_sigmas_scm(num_inference_steps, timesteps, strength)
            sampling = SprintSampling(self.transformer, self._call, sigmas, guidance_scale, generator)
        else:
            _refuse("a Sana model other than Sprint", timesteps=timesteps)
            generator = self._noise_source(generator, seed, latents)
            sigmas = self._flow_sigmas(sampler, num_inference_steps, shift, strength)
            layers = self._perturbed_layers(pag_applied_layers)
            guidance = (guidance_scale, pag_guidance_scale, guidance_interval, layers)
            sampling = FlowSampling(self.transformer, self._call, sampler, sigmas, *guidance)
        shape = self._latent_shape(height, width)
        cond = self._prepare_captions(prompt, complex_human_instruction, prompt_embeds, prompt_mask)
        shape = (len(cond.embeds), *shape)
        uncond = self._encode_negative(negative_prompt, shape[0]) if sampling.wants_negative else None
        source = None if image is None else prepare_source(self.vae, image, mask, shape)
        if source and mask is None and strength < 1 and scm.starts_from_noise(sigmas):
            logger.warning(scm.IMAGE_IGNORED, strength, len(sigmas) - 1)
        noise = self._prepare_latents(shape, latents, generator)
        control = self._prepare_control(control_image, control_strength, shape)
        x = self._sample(sampling.denoiser(cond, uncond, control), sampling, noise, source, callback)
        if output_type == "latent":
            return x
        pixels = self.decode(x, vae_tiling=vae_tiling)
        if source:
            pixels = source.paste_unmasked(pixels)
        return pixels if output_type == "pt" else to_pictures(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, vae_tiling: bool | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1, float32, of scaled latents [B, C, h, w].

        vae_tiling: True decodes in tiles, False whole; None in tiles if the GPU's free memory does not hold the whole.
        """
        return decode_latents(self.vae, latents, vae_tiling)

    @property
    def default_steps(self) -> int:
        """How many sampling steps suit the model: 20, or 2 for Sprint."""
        return scm.DEFAULT_STEPS if self.is_sprint else 20

    @property
    def is_sprint(self) -> bool:
        """Whether the transformer is Sana-Sprint's: it is sampled by SCM, and guidance is an input of it."""
        return self.transformer.config.guidance_embed

    @property
    def device(self) -> torch.device:
        """Where the transformer is, hence where sampling happens."""
        return next(self.transformer.parameters()).device

    def _check_parts(self) -> None:
        config, channels = self.transformer.config, self.vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"the transformer works on latents of {config.in_channels} channels, the autoencoder makes {channels}: "
                "they do not belong together"
            )
        if config.caption_channels != self.text_encoder.channels:
            raise ValueError(
                f"the transformer reads text features of {config.caption_channels} channels, the text encoder gives "
                f"{self.text_encoder.channels}: they do not belong together"
            )

        if self.controlnet is not None:
            self.controlnet.check_model(config)

    def _flow_sigmas(self, sampler: str, steps: int | None, shift: float | None, strength: float) -> Tensor:
        if sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        steps = self.default_steps if steps is None else steps
        sigmas = SCHEDULES[sampler](steps, self.shift if shift is None else shift)
        return partial_schedule(sigmas, strength)

    @staticmethod
    def _sample(
        model: Callable[..., Tensor],
        sampling: FlowSampling | SprintSampling,
        noise: Tensor,
        source: Source | None,
        callback: Callable[[dict], None] | None,
    ) -> Tensor:
        if source is None:
            return sampling.sample(model, sampling.start(noise, None), callback)
        start = sampling.start(noise, source.latents)
        return sampling.sample(source.keep_unmasked(model, noise), start, callback)

    def _prepare_control(self, image: Pictures | None, strength: float, shape: tuple[int, ...]) -> tuple[Control, ...]:
        if image is None:
            return ()
        hint, _ = encode_pictures(self.vae, "control_image", image, shape)
        return (Control(self.controlnet, hint.to(self.device), strength),)

    def _perturbed_layers(self, layers: int | Sequence[int] | None) -> tuple[int, ...]:
        return self.transformer.config.perturbed_layers([layers] if isinstance(layers, int) else layers)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        height = self.transformer.config.image_size if height is None else height
        width = self.transformer.config.image_size if width is None else width
        compression = self.vae.config.spatial_compression
        check_size(height, width, compression)
        return self.transformer.config.in_channels, height // compression, width // compression

    def _prepare_captions(self, prompt, instruction, embeds: Tensor | None, mask: Tensor | None) -> Captions:
        if (prompt is None) == (embeds is None):
            raise ValueError("give a prompt or prompt_embeds with prompt_mask, one of the two")
        if embeds is None:
            prompts = _as_list(prompt)
            if not prompts:
                raise ValueError("the list of prompts is empty")
            if not all(text.strip() for text in prompts):
                logger.warning("the prompt is empty: chance decides what the picture shows")
            return self._encode(prompts, instruction)
        expected = self.transformer.config.caption_channels
        if mask is None or embeds.ndim != 3 or embeds.shape[-1] != expected or mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"prompt_embeds {tuple(embeds.shape)} and prompt_mask {None if mask is None else tuple(mask.shape)} "
                f"do not fit: expected [B, L, {expected}] and [B, L]"
            )
        return Captions(require_finite(embeds, "whatever made prompt_embeds").to(self.device), mask.to(self.device))

    def _encode_negative(self, prompt: str | Sequence[str], count: int) -> Captions:
        prompts = _as_list(prompt)
        if len(prompts) not in (1, count):
            raise ValueError(f"{len(prompts)} negative prompts for {count} pictures: give one for all, or one for each")
        captions = self._encode(prompts, False)
        rows = count // len(prompts)
        return Captions(captions.embeds.repeat(rows, 1, 1), captions.mask.repeat(rows, 1))

    def _encode(self, prompts: list[str], instruction: bool | str) -> Captions:
        embeds, mask = self.text_encoder.encode(prompts, chi=instruction)
        return Captions(require_finite(embeds, "the text encoder").to(self.device), mask.to(self.device))

    @staticmethod
    def _noise_source(generator, seed, latents=None) -> torch.Generator | None:
        if sum(source is not None for source in (latents, generator, seed)) > 1:
            raise ValueError("latents, generator and seed exclude each other: give one of them, or none")
        return generator if seed is None else torch.Generator().manual_seed(seed)

    def _prepare_latents(self, shape, latents, generator) -> Tensor:
        if latents is None:
            return draw_noise(shape, generator).to(self.device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape} for this size and batch")
        return latents.to(self.device, torch.float32)


def _refuse(model: str, **arguments) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} given, which {model} has no use for: leave it out")


def _as_list(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _published_files(name: str) -> dict[str, Path]:
    try:
        return fetch_model(name)
    except ValueError as error:
        raise FileNotFoundError(
            f"{name} is not a folder. Expected one in the diffusers layout, with transformer/, vae/ and text_encoder/ "
            f"in it, or a published model. {error}"
        ) from error


def _require_paths(**paths: str | Path) -> None:
    missing = [f"{name} {path}" for name, path in paths.items() if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")


def _load_transformer(path: str | Path, variant: str | None, device: torch.device, dtype: torch.dtype | None):
    if dtype is not None:
        return load_transformer(path, variant=variant, device=device, dtype=dtype)
    # Official files are wider than what they were trained in: they are narrowed before they take memory of a GPU.
    transformer = load_transformer(path, variant=variant, kernels=best_kernels(device))
    trained = getattr(torch, transformer.config.dtype)
    on_cpu = fast_dtype(count_weights(transformer), trained)
    return transformer.to(device, on_cpu if device.type == "cpu" else trained)
