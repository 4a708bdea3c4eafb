"""What one call of the pipeline samples with: a flow sampler under guidance, or SCM for Sana-Sprint."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .captions import Captions, join_captions
from .finite import require_finite
from .models.controlnet import Control, repeat_last
from .models.sana import Perturbation, SanaTransformer
from .sampler import scm
from .sampler.flow import SAMPLERS
from .sampler.guidance import PAG_OFF, Interval, cfg_denoiser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowSampling:
    """Flow samplers under classifier-free and perturbed-attention guidance, for every Sana model but Sprint."""

    transformer: SanaTransformer
    sampler: str
    sigmas: Tensor
    scale: float
    pag_scale: float
    interval: Interval | None
    perturbed_layers: tuple[int, ...]

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
            velocity(self.transformer, captions, self.perturbed_layers, control),
            scale=self.scale,
            pag_scale=self.pag_scale,
            interval=self.interval,
            floor_timesteps=whole,
        )

    def sample(self, model: Callable[..., Tensor], x: Tensor, callback) -> Tensor:
        """Scaled latents, sampled from `start` by `denoiser` or what is put around it."""
        return SAMPLERS[self.sampler](model, x, self.sigmas.to(x.device), callback=callback)


@dataclass(frozen=True)
class SprintSampling:
    """SCM, for Sana-Sprint. Guidance is an input of the network, and there is no negative prompt."""

    transformer: SanaTransformer
    sigmas: Tensor
    scale: float
    generator: torch.Generator | None

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
        return scm.flow_denoiser(velocity(self.transformer, cond, control=control, guidance=guidance))

    def sample(self, model: Callable[..., Tensor], x: Tensor, callback) -> Tensor:
        """Scaled latents, sampled from `start` by `denoiser` or what is put around it."""
        return scm.sample_scm(
            model,
            x,
            self.sigmas.to(x.device),
            callback=callback,
            noise_sampler=lambda *_: draw_noise(x.shape, self.generator),
        )


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """float32 noise of unit deviation, where the generator is, else on the CPU."""
    return torch.randn(tuple(shape), generator=generator, device="cpu" if generator is None else generator.device)


def velocity(
    transformer: SanaTransformer,
    captions: Captions,
    perturbed_layers: tuple[int, ...] = (),
    control: Sequence[Control] = (),
    **inputs: Tensor,
) -> Callable[..., Tensor]:
    """What denoisers ask: the transformer with captions and further inputs in place, and the layers that it perturbs.

    Fewer rows than captions are the last ones. Hints, one for all or one a picture, are repeated for all rows.
    Calls, one a step, are counted to say where it failed.
    """
    nets = {one.net for one in control if one.strength}
    context = transformer.prepare_context(captions.embeds.to(transformer.dtype), captions.mask, nets)
    steps = itertools.count(1)

    def predict(x: Tensor, timestep: Tensor, perturbed_rows: int = 0) -> Tensor:
        cache = context if len(x) == len(captions.mask) else context.rows(slice(-len(x), None))
        perturbation = Perturbation(perturbed_layers, perturbed_rows) if perturbed_rows else None
        controls = [_for_rows(one, len(x)) for one in control]
        rows = transformer(
            x.to(transformer.dtype), timestep, cache, perturbation=perturbation, control=controls, **inputs
        )
        return require_finite(rows, f"the transformer at step {next(steps)}")

    return predict


def _for_rows(control: Control, count: int) -> Control:
    return control if len(control.hint) == 1 else replace(control, hint=repeat_last(control.hint, count))
