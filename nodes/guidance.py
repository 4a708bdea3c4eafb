"""Guidance beyond the plain cfg: perturbed attention as a patch of MODEL, and an interval of noise levels."""

from collections.abc import Iterator, Sequence

import comfy.model_patcher
import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..sana_core.sampler.guidance import Interval, check_interval, is_within, parse_layers, perturbed_attention_guidance
from .adapter import SanaModel


def perturb_attention(
    patcher: comfy.model_patcher.ModelPatcher,
    scale: float,
    layers: Sequence[int] | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL that adds scale * (cond - perturbed) to whatever its guidance gives.

    The perturbed prediction is one of its own on the positive conditioning, so that areas, masks, batches and other
    patches hold for it too. `layers` None takes the model's own; percents are those of the schedule, as ComfyUI's.
    Raises ValueError for a model that is not Sana, and for layers that it does not have.
    """
    if not isinstance(patcher.model, SanaModel):
        raise ValueError(
            f"Sana PAG got a {type(patcher.model).__name__}, whose layers it does not know: connect a Sana model, or "
            "use ComfyUI's PerturbedAttentionGuidance."
        )
    layers = patcher.model.diffusion_model.config.perturbed_layers(layers)

    always = start_percent <= 0 and end_percent >= 1  # what the level is need not be read from the GPU then

    def acts_at(sampling, sigma: Tensor) -> bool:
        first, last = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)
        return always or last <= sigma[0].item() <= first

    def add_guidance(args: dict):
        if not acts_at(args["model"].model_sampling, args["sigma"]):
            return args["denoised"]
        options = args["model_options"].copy()
        for layer in layers:
            options = comfy.model_patcher.set_model_options_patch_replace(
                options, _attend_to_itself, "attn1", "block", layer
            )
        (perturbed,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return perturbed_attention_guidance(args["denoised"], args["cond_denoised"], perturbed, scale)

    patcher = patcher.clone()
    if scale != 0:
        patcher.set_model_sampler_post_cfg_function(add_guidance)
    return patcher


def _attend_to_itself(q, k, v, extra_options):
    return v


class IntervalGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider, whose cfg counts within an interval of sigma only; None is everywhere."""

    interval: Interval | None = None
    guided_steps: Iterator[bool] = iter(())

    def set_interval(self, interval: Interval | None) -> None:
        """Raises ValueError for an empty interval."""
        if interval is not None:
            check_interval(interval)
        self.interval = interval

    def sample(self, noise, latent_image, sampler, sigmas, **options):
        """As core's, for a sampler that asks for the x0 once at each of the sigmas, as Sana's own do."""
        # While they are on the CPU: to read a level from the GPU, each step would wait for the one before.
        self.guided_steps = iter([is_within(self.interval, level) for level in sigmas.tolist()])
        return super().sample(noise, latent_image, sampler, sigmas, **options)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """The guided x0. Outside of the interval the negative conditioning is not even asked."""
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds["negative"],
            self.conds["positive"],
            self.cfg if next(self.guided_steps) else 1.0,
            model_options=model_options or {},
            seed=seed,
        )


class SanaPAG(io.ComfyNode):
    """Perturbed-attention guidance for any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaPAG",
            display_name="Sana PAG",
            category="sana/sampling",
            description="Perturbed-attention guidance: steers away from what the model draws when some layers cannot "
            "look around. Shapes get more coherent; a step takes 1.5 times as long.",
            search_aliases=["perturbed attention guidance", "pag", "sana perturbed attention"],
            inputs=[
                io.Model.Input("model", tooltip="Sana model from Load Sana Model."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How hard to steer. 0 switches it off; Sana's authors suggest 2 together with cfg 5, "
                    "diffusers starts from 3.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Which transformer blocks to perturb, such as 8 or 8,14. Empty takes the model's own: 8 "
                    "for the 1.6B models, 14 for the 0.6B ones.",
                ),
                _percent("start_percent", 0.0, "From which part of the schedule on it steers; 0 is the first step."),
                _percent("end_percent", 1.0, "Up to which part of the schedule it steers; 1 is the last step."),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="The model with the guidance added.")],
        )

    @classmethod
    def validate_inputs(cls, layers="") -> bool | str:
        """Refuse what is not a list of numbers before anything runs."""
        try:
            _named_layers(layers)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, scale, layers="", start_percent=0.0, end_percent=1.0) -> io.NodeOutput:
        """The patched MODEL."""
        return io.NodeOutput(perturb_attention(model, scale, _named_layers(layers), start_percent, end_percent))


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.001, optional=True, advanced=True, tooltip=tooltip
    )


def _named_layers(text: str) -> list[int] | None:
    return parse_layers(text) if text.strip() else None
