"""Sampling as the official Sana code does it, inside ComfyUI's own machinery."""

import functools
import logging

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..sana_core.sampler.flow import SAMPLERS
from ..sana_core.sampler.guidance import PAG_OFF, Interval
from ..sana_core.sampler.schedule import SCHEDULES
from .adapter import FLOOR_TIMESTEPS
from .guidance import IntervalGuider, perturb_attention
from .limits import check_values

log = logging.getLogger(__name__)

_FULL_NOISE = 0.995  # the official first sigma is 0.9990 or more for any shift from 1 up


def flow_sampler(name: str) -> comfy.samplers.KSAMPLER:
    """ComfyUI's SAMPLER around one of `SAMPLERS`, which then sees what the official code would show it."""
    sample = SAMPLERS[name]

    @functools.wraps(sample)
    def sample_in_comfyui(model, x, sigmas, extra_args, callback=None, disable=None):
        if name == "flow_dpm-solver":
            extra_args = _with_floor(extra_args)
        x = _unscaled_noise(model, x, sigmas)
        return sample(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    return comfy.samplers.KSAMPLER(sample_in_comfyui)


def _unscaled_noise(model, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Undo ComfyUI's noise * sigma at a start from nothing but noise: Sana starts from the noise itself."""
    if float(sigmas[0]) < _FULL_NOISE or torch.count_nonzero(model.latent_image) > 0:
        return x
    return x / sigmas[0]


def _with_floor(extra_args: dict) -> dict:
    """The arguments of the denoiser, with whole timesteps asked for, as official Flow-DPM-Solver has them."""
    options = extra_args["model_options"]
    transformer_options = {**options.get("transformer_options", {}), FLOOR_TIMESTEPS: True}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer_options}}


def flow_sigmas(model, schedule: str, steps: int, shift: float, denoise: float) -> torch.Tensor:
    """The sigmas of a schedule: steps + 1 values, or none for denoise 0. Shift 0 takes the model's own.

    Partial denoising walks the last `steps` steps of a longer schedule, as ComfyUI's BasicScheduler does.
    """
    if denoise <= 0:
        return torch.empty(0)
    sigmas = SCHEDULES[schedule](int(steps / min(denoise, 1.0)), shift or _model_shift(model))
    return sigmas[-(steps + 1) :]


def _guider(model, positive, negative, cfg: float, pag_scale: float, interval: Interval | None) -> IntervalGuider:
    if interval == (0, 1):
        interval = None  # everywhere, also where flow_euler starts: at 1 itself
    if pag_scale > PAG_OFF:
        model = perturb_attention(model, pag_scale)
        if interval is not None:
            log.warning("The guidance interval is ignored: perturbed-attention guidance is on.")
            interval = None
    guider = IntervalGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    guider.set_interval(interval)
    return guider


def _model_shift(model) -> float:
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        raise ValueError(
            f"The model has no flow shift (it samples with {type(sampling).__name__}). Connect a Sana model, "
            "or set shift to a number above 0."
        )
    return sampling.shift


def fitted_samples(model, latent_image: dict) -> torch.Tensor:
    """The latent's samples; empty ones get the channels and the size that the model needs."""
    return comfy.sample.fix_empty_latent_channels(
        model,
        latent_image["samples"],
        latent_image.get("downscale_ratio_spacial"),
        latent_image.get("downscale_ratio_temporal"),
    )


def sample_latent(
    guider: comfy.samplers.CFGGuider,
    latent_image: dict,
    samples: torch.Tensor,
    noise: torch.Tensor,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: torch.Tensor,
    seed: int,
) -> dict:
    """The latent with what the guider samples from noise and `fitted_samples`, whose marks it no longer carries."""
    samples = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent_image.get("noise_mask"),
        callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    samples = samples.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())
    resized = {"downscale_ratio_spacial", "downscale_ratio_temporal"}
    kept = {key: value for key, value in latent_image.items() if key not in resized}
    return {**kept, "samples": samples}


def seed_input(
    tooltip: str = "Number that the noise is drawn from: the same seed gives the same picture.",
) -> io.Int.Input:
    """The seed of every sampler, and of the trainer."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip=tooltip,
    )


def _steps() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=1000,
        tooltip="Sampling steps. 14 to 20 are enough for Flow-DPM-Solver, 28 for Flow-Euler.",
    )


def _shift() -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=0.0,
        optional=True,
        min=0.0,
        max=100.0,
        step=0.1,
        advanced=True,
        tooltip="Moves the noise levels towards more noise; larger pictures need more. 0 takes the model's own "
        "(3 for most, 4 for the 0.6B at 1024 px, 6 for 4K), which ModelSamplingSD3 can change.",
    )


def _denoise() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        optional=True,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 makes a new picture. Lower values keep more of the input latent (image to image).",
    )


def _interval_end(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=tooltip
    )


class SanaSampler(io.ComfyNode):
    """Noise to latent in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaSampler",
            display_name="Sana Sampler",
            category="sana/sampling",
            description="Samples a picture's latent with Sana's own solver, schedule and timesteps, as the official "
            "pipeline does.",
            search_aliases=["ksampler", "flow dpm solver", "sana ksampler", "sample"],
            inputs=[
                io.Model.Input("model", tooltip="Sana model from Load Sana Model."),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not show; an encoded empty text for nothing."),
                io.Latent.Input(
                    "latent_image", tooltip="Empty Sana Latent, or a picture encoded by Sana DC-AE Encode."
                ),
                seed_input(),
                _steps(),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How hard to follow the prompt. 1 switches guidance off and ignores the negative prompt, "
                    "in half the time; 2 to 2.5 looks softer, 4.5 is Sana's default.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="flow_dpm-solver",
                    tooltip="flow_dpm-solver: second order, Sana's default. flow_euler: first order, with the "
                    "schedule that belongs to it; wants about 28 steps.",
                ),
                _shift(),
                _denoise(),
                io.Float.Input(
                    "pag_scale",
                    default=PAG_OFF,
                    optional=True,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    advanced=True,
                    tooltip="Perturbed-attention guidance, for more coherent shapes in 1.3 times the time. As in "
                    "official Sana it is off up to 1; try 2 with cfg 5. Sana PAG has more settings.",
                ),
                _interval_end(
                    "guidance_interval_low",
                    0.0,
                    "cfg counts only above this noise level, of 0 to 1; below, the prompt alone is followed, in half "
                    "the time. Ignored with pag_scale.",
                ),
                _interval_end(
                    "guidance_interval_high",
                    1.0,
                    "cfg counts only below this noise level, of 0 to 1; above, the prompt alone is followed, in half "
                    "the time. Ignored with pag_scale.",
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="The sampled latent.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler,
        shift=0.0,
        denoise=1.0,
        pag_scale=PAG_OFF,
        guidance_interval_low=0.0,
        guidance_interval_high=1.0,
    ) -> io.NodeOutput:
        """The latent dictionary with new samples. Raises ValueError for a value beyond its widget's limits."""
        inputs = cls.define_schema().inputs
        check_values(inputs, seed=seed, steps=steps, cfg=cfg, sampler=sampler, denoise=denoise)
        samples = fitted_samples(model, latent_image)
        sigmas = flow_sigmas(model, sampler, steps, shift, denoise)
        interval = (guidance_interval_low, guidance_interval_high)
        guider = _guider(model, positive, negative, cfg, pag_scale, interval)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        return io.NodeOutput(sample_latent(guider, latent_image, samples, noise, flow_sampler(sampler), sigmas, seed))


class SanaFlowDPMSolver(io.ComfyNode):
    """The solver alone, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaFlowDPMSolver",
            display_name="Flow-DPM-Solver",
            category="sana/sampling",
            description="Sana's default solver as a SAMPLER for SamplerCustom and SamplerCustomAdvanced. Give it the "
            "sigmas of Sana Scheduler.",
            search_aliases=["flow dpm solver", "sana sampler", "sampler select", "dpm++ 2m flow"],
            inputs=[],
            outputs=[io.Sampler.Output("sampler", display_name="SAMPLER", tooltip="Second-order multistep solver.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """The SAMPLER."""
        return io.NodeOutput(flow_sampler("flow_dpm-solver"))


class SanaScheduler(io.ComfyNode):
    """The noise levels alone, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaScheduler",
            display_name="Sana Scheduler",
            category="sana/sampling",
            description="Sana's own noise levels as SIGMAS for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["flow sigmas", "sana sigmas", "flow shift", "scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="Sana model; its own shift is used where shift is 0."),
                _steps(),
                _shift(),
                _denoise(),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="flow_dpm-solver",
                    optional=True,
                    advanced=True,
                    tooltip="flow_dpm-solver: for Flow-DPM-Solver and most others. flow_euler: the levels that "
                    "official Sana uses with Euler steps.",
                ),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="SIGMAS", tooltip="Noise levels from about 1 to 0.")],
        )

    @classmethod
    def execute(cls, model, steps, shift=0.0, denoise=1.0, schedule="flow_dpm-solver") -> io.NodeOutput:
        """The SIGMAS."""
        return io.NodeOutput(flow_sigmas(model, schedule, steps, shift, denoise))
