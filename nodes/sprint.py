"""Sana-Sprint: one to four steps, inside ComfyUI's own machinery."""

import logging

import comfy.sample
import comfy.samplers
import node_helpers
import torch
from comfy_api.latest import io

from ..sana_core.sampler import scm
from .adapter import SPRINT_GUIDANCE, SanaModel
from .limits import check_values
from .sampling import fitted_samples, sample_latent, seed_input

log = logging.getLogger(__name__)


class SprintGuider(comfy.samplers.CFGGuider):
    """One call a step for the positive conditioning: guidance is an input of the network."""

    def set_conds(self, positive, guidance: float) -> None:
        """`guidance`: the scale that the network embeds."""
        positive = node_helpers.conditioning_set_values(positive, {SPRINT_GUIDANCE: guidance})
        self.inner_set_conds({"positive": positive})


def scm_sampler(fresh_noise) -> comfy.samplers.KSAMPLER:
    """ComfyUI's SAMPLER around `sample_scm`; `fresh_noise()` draws unit noise on the CPU for each step."""

    def sample_in_comfyui(model, x, sigmas, extra_args, callback=None, disable=None):
        if torch.count_nonzero(model.latent_image) == 0:
            first = sigmas[0].item()  # by which ComfyUI has multiplied the noise
            x = x * (scm.pure_noise_scale(first) / first)
        return scm.sample_scm(model, x, sigmas, extra_args, callback, disable, noise_sampler=lambda *_: fresh_noise())

    return comfy.samplers.KSAMPLER(sample_in_comfyui)


def sprint_sigmas(steps: int, timesteps: str, denoise: float) -> torch.Tensor:
    """The noise levels: of `steps` steps, or of the angles in the text if there are any; none for denoise 0."""
    if denoise <= 0:
        return torch.empty(0)
    angles = _read_angles(timesteps)
    return scm.get_sigmas_scm(None if angles else steps, angles or None, min(denoise, 1.0))


def _read_angles(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"timesteps are {text!r}; expected numbers such as 1.5708, 1.3, 0, or nothing") from error


def _require_sprint(model) -> None:
    network = model.model
    if not isinstance(network, SanaModel):
        found = f"a {type(network).__name__}"
    elif not network.diffusion_model.config.guidance_embed:
        found = "another Sana model"
    else:
        return
    raise ValueError(
        f"The Sana Sprint Sampler needs a Sana-Sprint model, and got {found}. Load a Sprint file with Load Sana Model, "
        "or use the Sana Sampler or KSampler."
    )


class SanaSprintSampler(io.ComfyNode):
    """Noise to latent in one to four steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaSprintSampler",
            display_name="Sana Sprint Sampler",
            category="sana/sampling",
            description="Samples a picture's latent with a Sana-Sprint model in one to four steps, as the official "
            "pipeline does. There is no negative prompt.",
            search_aliases=["ksampler", "scm", "sana sprint", "few step", "one step", "sample"],
            inputs=[
                io.Model.Input("model", tooltip="Sana-Sprint model from Load Sana Model."),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Latent.Input(
                    "latent_image", tooltip="Empty Sana Latent, or a picture encoded by Sana DC-AE Encode."
                ),
                seed_input(),
                io.Int.Input(
                    "steps",
                    default=scm.DEFAULT_STEPS,
                    min=1,
                    max=4,
                    tooltip="Sampling steps. 2 is the official default; 4 gives more detail, 1 less.",
                ),
                io.Float.Input(
                    "guidance",
                    default=4.5,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How hard to follow the prompt. The model was trained with 4 to 5. It costs no time.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    optional=True,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 makes a new picture. Lower values leave out that share of the steps, rounded down, and "
                    "keep more of the input latent: of 2 steps 0.5 leaves one, of 4 steps 0.75 leaves three.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The steps' own angles instead of the official ones, falling to 0, such as 1.5708, 1.3, 0. "
                    "They replace steps. The first one says how much of an input picture goes: 1.5708 all, 0.8 half.",
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="The sampled latent.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed, steps=scm.DEFAULT_STEPS, guidance=4.5, denoise=1.0, timesteps=""
    ) -> io.NodeOutput:
        """The latent dictionary with new samples.

        Raises ValueError for a model that is no Sprint, and for a value beyond its widget's limits.
        """
        _require_sprint(model)
        inputs = cls.define_schema().inputs
        check_values(inputs, seed=seed, steps=steps, guidance=guidance, denoise=denoise)
        sigmas = sprint_sigmas(steps, timesteps, denoise)
        samples = fitted_samples(model, latent_image)
        if 0 < denoise < 1 and scm.starts_from_noise(sigmas) and torch.count_nonzero(samples):
            log.warning(scm.IMAGE_IGNORED, denoise, len(sigmas) - 1)
        generator = torch.Generator().manual_seed(seed)

        def noise() -> torch.Tensor:
            return comfy.sample.prepare_noise_inner(samples, generator, latent_image.get("batch_index"))

        guider = SprintGuider(model)
        guider.set_conds(positive, guidance)
        return io.NodeOutput(sample_latent(guider, latent_image, samples, noise(), scm_sampler(noise), sigmas, seed))
