"""Guidance beyond the plain cfg: perturbed attention as a patch of MODEL, and an interval of noise levels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
from comfy_api.latest import io

from ..sana_core.sampler.guidance import Interval, check_interval, is_within, parse_layers, perturbed_attention_guidance
from .adapter import SanaModel
from .perturbation import PERTURBED, PerturbedList, attend_to_themselves


def perturb_attention(
    patcher: comfy.model_patcher.ModelPatcher,
    scale: float,
    layers: Sequence[int] | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL that adds scale * (cond - perturbed) to whatever its guidance gives.

    The perturbed prediction is one on the positive conditioning, so that areas, masks and batches hold for it too. It
    is made in one call with the others, up to the first perturbed block once for both; where another patch could see
    that, or the weights change, in a call of its own. `layers` None takes the model's own; percents are those of the
    schedule, as ComfyUI's.
    Raises ValueError for a model that is not Sana, and for layers that it does not have.
    """
    if not isinstance(patcher.model, SanaModel):
        raise ValueError(
            f"Sana PAG got a {type(patcher.model).__name__}, whose layers it does not know: connect a Sana model, or "
            "use ComfyUI's PerturbedAttentionGuidance."
        )
    layers = patcher.model.diffusion_model.config.perturbed_layers(layers)
    patcher = patcher.clone()
    if scale != 0:
        guidance = PerturbedGuidance(scale, tuple(layers), start_percent, end_percent)
        patcher.add_wrapper(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, guidance.predict)
        patcher.set_model_sampler_post_cfg_function(guidance.add)
    return patcher


@dataclass(frozen=True)
class PerturbedGuidance:
    """One node's guidance: asks for the perturbed prediction together with the others, and adds what it says."""

    scale: float
    layers: tuple[int, ...]
    start_percent: float
    end_percent: float

    def predict(self, executor, model, conds, x, timestep, model_options):
        """Core's predictions for lists of conditionings. The perturbed one, made with them, waits in the options."""
        if not (len(conds) == 2 and self._counts(model, timestep) and _can_share(model, conds, model_options)):
            return executor(model, conds, x, timestep, model_options)
        options = {**model_options["transformer_options"], PERTURBED: PerturbedList(len(conds), self.layers)}
        *predictions, perturbed = executor(
            model, [*conds, conds[0]], x, timestep, {**model_options, "transformer_options": options}
        )
        model_options[_AHEAD] = (self, conds[0], x, timestep, perturbed)  # the options of one sampling run
        return predictions

    def add(self, args: dict):
        """Core's hook behind the guidance."""
        perturbed = self._predicted(args)
        if perturbed is None:
            if not self._counts(args["model"], args["sigma"]):
                return args["denoised"]
            options = attend_to_themselves(args["model_options"], self.layers)
            (perturbed,) = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], options
            )
        return perturbed_attention_guidance(args["denoised"], args["cond_denoised"], perturbed, self.scale)

    def _predicted(self, args: dict):
        """The prediction that was made ahead, if it is for what is asked now, not only for something equal."""
        ahead = args["model_options"].get(_AHEAD)
        asked = self, args["cond"], args["input"], args["sigma"]
        if ahead is None or any(one is not other for one, other in zip(ahead, asked, strict=False)):
            return None
        return args["model_options"].pop(_AHEAD)[-1]

    def _counts(self, model, sigma) -> bool:
        if (self.start_percent, self.end_percent) == (0, 1):
            return True  # without a look at the number, for which a GPU would have to finish
        first, last = (model.model_sampling.percent_to_sigma(end) for end in (self.start_percent, self.end_percent))
        return last <= float(sigma[0]) <= first


_AHEAD = "sana_perturbed_ahead"


def _can_share(model, conds: list, model_options: dict) -> bool:
    """Whether nothing but the model will see the batch, whose order and length it changes on the way."""
    patcher, options = model.current_patcher, model_options.get("transformer_options", {})
    kinds = comfy.patcher_extension.WrappersMP
    wrappers = [
        one
        for kind in (kinds.CALC_COND_BATCH, kinds.APPLY_MODEL, kinds.DIFFUSION_MODEL)
        for one in comfy.patcher_extension.get_all_wrappers(kind, options)
    ]
    takers = ("context_handler", "multigpu_clones", "model_function_wrapper", "sampler_calc_cond_batch_function")
    ids = [cond["uuid"] for cond in conds[0] or ()]
    return bool(
        len(set(ids)) == len(ids) > 0
        and not any("hooks" in cond or "default" in cond for some in conds for cond in some or ())
        and patcher.current_hooks is None
        and patcher.forced_hooks is None
        and not any(name in model_options for name in takers)
        and not any(options.get(name) for name in ("patches", "patches_replace", "optimized_attention_override"))
        and all(isinstance(getattr(one, "__self__", None), PerturbedGuidance) for one in wrappers)
    )


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
            "look around. Shapes get more coherent; a step takes about 1.3 times as long.",
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
