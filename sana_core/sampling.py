"""What one call of the pipeline samples with: a flow sampler under guidance, or SCM for Sana-Sprint."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from .captions import Captions, join_captions
from .finite import FiniteSteps
from .models.controlnet import Control, repeat_last
from .models.sana import ContextCache, Perturbation, SanaTransformer
from .sampler import scm
from .sampler.flow import SAMPLERS
from .sampler.guidance import PAG_OFF, Interval, cfg_denoiser

logger = logging.getLogger(__name__)


def _steps() -> FiniteSteps:
    return FiniteSteps("the transformer")


@dataclass(frozen=True)
class FlowSampling:
    """Flow samplers under classifier-free and perturbed-attention guidance, for every Sana model but Sprint.

    call: what is called like the transformer: itself, or what repeats its calls from graphs.
    """

    transformer: SanaTransformer
    call: Callable[..., Tensor]
    sampler: str
    sigmas: Tensor
    scale: float
    pag_scale: float
    interval: Interval | None
    perturbed_layers: tuple[int, ...]
    steps: FiniteSteps = field(default_factory=_steps, init=False)

    def __post_init__(self):
        if self.pag_scale > PAG_OFF and self.interval is not None:
            logger.warning("the guidance interval is ignored: perturbed-attention guidance is on")

    @property
    def wants_negative(self) -> bool:
        """Whether the negative prompt counts."""
        return self.scale != 1

    def start(self, noise: Tensor, image: Tensor | None) -> Tensor:
        """What the sampler starts from: noise, or an image's latents at the first noise level."""
        return noise if image is None else torch.lerp(image, noise, self.sigmas[0].item())

    def denoiser(
        self, cond: Captions, uncond: Captions | None, control: Sequence[Control] = ()
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`model(x, sigma) -> denoised` under these captions; ControlNets count for both."""
        captions = cond if uncond is None else join_captions(uncond, cond)
        # Official Flow-DPM-Solver truncates the timestep, unless the model divides it by itself.
        whole = self.sampler == "flow_dpm-solver" and self.transformer.config.timestep_scale == 1
        return cfg_denoiser(
            velocity(self, captions, self.perturbed_layers, control),
            scale=self.scale,
            pag_scale=self.pag_scale,
            interval=self.interval,
            levels=self.sigmas.tolist(),
            floor_timesteps=whole,
        )

    def sample(self, model: Callable[..., Tensor], x: Tensor, callback) -> Tensor:
        """Scaled latents, sampled from `start` by `denoiser` or what is put around it.

        Raises FloatingPointError, with the step, for NaN or infinity.
        """
        latents = SAMPLERS[self.sampler](model, x, self.sigmas, callback=callback)
        self.steps.check()
        return latents


@dataclass(frozen=True)
class SprintSampling:
    """SCM, for Sana-Sprint. Guidance is an input of the network, and there is no negative prompt.

    call: as for `FlowSampling`.
    """

    transformer: SanaTransformer
    call: Callable[..., Tensor]
    sigmas: Tensor
    scale: float
    generator: torch.Generator | None
    steps: FiniteSteps = field(default_factory=_steps, init=False)

    wants_negative = False

    def start(self, noise: Tensor, image: Tensor | None) -> Tensor:
        """As `FlowSampling.start`, with noise alone of the deviation that SCM starts from."""
        first = self.sigmas[0].item()
        return scm.pure_noise_scale(first) * noise if image is None else torch.lerp(image, noise, first)

    def denoiser(
        self, cond: Captions, uncond: None = None, control: Sequence[Control] = ()
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`model(x, sigma) -> denoised` under these captions and ControlNets."""
        guidance = torch.full((len(cond.mask),), float(self.scale), device=cond.embeds.device)
        return scm.flow_denoiser(velocity(self, cond, control=control, guidance=guidance))

    def sample(self, model: Callable[..., Tensor], x: Tensor, callback) -> Tensor:
        """As `FlowSampling.sample`."""
        latents = scm.sample_scm(
            model,
            x,
            self.sigmas,
            callback=callback,
            noise_sampler=lambda *_: draw_noise(x.shape, self.generator),
        )
        self.steps.check()
        return latents


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """float32 noise of unit deviation, where the generator is, else on the CPU."""
    return torch.randn(tuple(shape), generator=generator, device="cpu" if generator is None else generator.device)


def prepare_noise(shape: Sequence[int], seed: int) -> Tensor:
    """float32 noise drawn on the CPU, the same on every machine and the same as ComfyUI's samplers draw."""
    return draw_noise(shape, torch.Generator().manual_seed(seed))


def velocity(
    sampling: FlowSampling | SprintSampling,
    captions: Captions,
    perturbed_layers: tuple[int, ...] = (),
    control: Sequence[Control] = (),
    **inputs: Tensor,
) -> Callable[..., Tensor]:
    """What denoisers ask: the transformer with captions and further inputs in place, and the layers that it perturbs.

    Fewer rows than captions are the last ones. Hints, one for all or one a picture, are repeated for all rows.
    """
    transformer = sampling.transformer
    nets = {one.net for one in control if one.strength}
    context = transformer.prepare_context(captions.embeds.to(transformer.dtype), captions.mask, nets, absorb=True)

    @cache  # one object for all steps: graphs then need not copy its values at each
    def of_rows(count: int) -> ContextCache:
        return context if count == len(captions.mask) else context.rows(slice(-count, None))

    def predict(x: Tensor, timestep: Tensor, perturbed_rows: int = 0) -> Tensor:
        perturbation = Perturbation(perturbed_layers, perturbed_rows) if perturbed_rows else None
        controls = [_for_rows(one, len(x)) for one in control]
        x = x.to(transformer.dtype)
        rows = sampling.call(x, timestep, of_rows(len(x)), perturbation=perturbation, control=controls, **inputs)
        return sampling.steps.watch(rows)

    return predict


def _for_rows(control: Control, count: int) -> Control:
    return control if len(control.hint) == 1 else replace(control, hint=repeat_last(control.hint, count))
