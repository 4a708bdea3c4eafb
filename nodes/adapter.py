"""ComfyUI's MODEL around the Sana transformer: latent format, settings, conditioning, loading."""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.cli_args import args
from torch import Tensor
from torch.nn.functional import pad

from ..sana_core.checkpoint import check_weights, config_tensor, read_transformer, scaled_layers, without_scales
from ..sana_core.config import TRANSFORMERS, SanaConfig
from ..sana_core.finite import require_finite
from ..sana_core.models.controlnet import Control
from ..sana_core.models.graph import GraphedCalls
from ..sana_core.models.packing import PackedCalls
from ..sana_core.models.sana import ContextCache, SanaTransformer
from ..sana_core.processor import fast_dtype
from .bfloat16 import chooses_for_cpu, computes_on_cpu
from .contexts import CaptionIds, PreparedContexts, kept_nets
from .hooks import Hooks
from .perturbation import PERTURBATION, PERTURBED, Rows, predict_parts

log = logging.getLogger(__name__)

SPRINT_GUIDANCE = "sana_sprint_guidance"  # in a conditioning: the scale that Sprint embeds; only its sampler sets it
FLOOR_TIMESTEPS = "sana_floor_timesteps"  # in transformer_options: feed whole timesteps, as official Flow-DPM does
CONTEXT = "sana_context"  # in transformer_options: the prepared captions, or the features that may become them
CALLS = "sana_calls"  # in transformer_options: what to call where weights stay as they are: graphs, packed weights
CONTROL = "sana"  # in what core calls a control: the tuple of Controls, which run within the transformer

_PREVIEW_FACTORS = json.loads(Path(__file__).with_name("preview_factors.json").read_text(encoding="utf-8"))


class SanaLatent(comfy.latent_formats.LatentFormat):
    """Latents of the 32-pixel, 32-channel DC-AE. Outside of the MODEL they are unscaled."""

    scale_factor = 0.41407
    latent_channels = 32
    latent_dimensions = 2
    spacial_downscale_ratio = 32  # core's spelling

    def __init__(self, autoencoder: str):
        """`autoencoder`: whose previews to show, a key of preview_factors.json; without factors there are none."""
        preview = _PREVIEW_FACTORS[autoencoder]
        if preview is not None:
            self.latent_rgb_factors = preview["factors"]
            self.latent_rgb_factors_bias = preview["bias"]


class ComfySana(SanaTransformer):
    """The transformer with ComfyUI's calling convention, attention backends and patches."""

    def __init__(self, image_model: str, config: SanaConfig, *, device=None, dtype=None, operations):
        """`image_model` is core's name for the family, which it passes with the rest of the configuration."""
        hooks = Hooks()
        factory = {"dtype": dtype, "operations": operations}
        if dtype is not None and dtype.itemsize == 1:
            factory = _float8_factory(dtype, operations)
        super().__init__(config, device=device, kernels=hooks.kernels, **factory)
        self.image_model = image_model
        self.weight_dtype = dtype
        self.hooks = hooks
        hooks.attach(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the weights were asked for in: with dynamic loading they come in it only when they are used."""
        return self.weight_dtype

    def forward(self, x, timesteps, context=None, attention_mask=None, transformer_options=None, **kwargs) -> Tensor:
        """Velocity of x [B, C, h, w] at timesteps [B] in 0..1000; context [B, L, C], attention_mask [B, L].

        Sprint's timesteps are in 0..1, and it needs the guidance scale, a number.
        """
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, attention_mask, options, **kwargs)

    def _forward(
        self, x, timesteps, context, attention_mask, transformer_options, guidance=None, control=None, **_
    ) -> Tensor:
        # Models that divide the timestep themselves were trained on fractions.
        if transformer_options.get(FLOOR_TIMESTEPS) and self.config.timestep_scale == 1:
            timesteps = timesteps.floor()
        perturbation = transformer_options.get(PERTURBATION)
        if perturbation is not None:  # the transformer makes the copies by itself
            x, timesteps = x[: -perturbation.rows], timesteps[: -perturbation.rows]
        if guidance is not None:
            guidance = torch.full((len(x),), guidance, device=x.device)
        controls = sana_controls(control)
        prepared = transformer_options.get(CONTEXT)
        if isinstance(prepared, ContextCache):
            context, attention_mask = prepared, None
        with ExitStack() as patched:
            for hooks in (self.hooks, *(one.net.hooks for one in controls)):
                patched.enter_context(hooks.using(transformer_options))
            predict = transformer_options.get(CALLS, super().forward)
            return predict(
                x,
                timesteps,
                context,
                mask=attention_mask,
                guidance=guidance,
                perturbation=perturbation,
                control=controls,
            )


def sana_controls(control: dict | None) -> tuple[Control, ...]:
    if control is not None and CONTROL not in control:
        raise ValueError(
            "The conditioning carries a ControlNet for another model, which cannot control Sana. Load one that was "
            "made for Sana with Load Sana ControlNet."
        )
    return () if control is None else control[CONTROL]


def _float8_factory(dtype: torch.dtype, operations) -> dict:
    """Arguments of SanaTransformer for 8-bit linear layers and convolutions; norms and tables need more digits."""

    def narrow(layer):
        return lambda *args, **kwargs: layer(*args, **{**kwargs, "dtype": dtype})

    layers = SimpleNamespace(
        Linear=narrow(operations.Linear), Conv2d=narrow(operations.Conv2d), RMSNorm=operations.RMSNorm
    )
    return {"dtype": torch.bfloat16, "operations": layers}


class SprintSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow matching whose first level is a trifle above 1, since Sprint starts at an angle a trifle above pi / 2."""

    def percent_to_sigma(self, percent):
        """The level at which a conditioning starts or ends; the start of sampling comes before every level."""
        return math.inf if percent <= 0 else super().percent_to_sigma(percent)


class SanaModel(comfy.model_base.BaseModel):
    """The MODEL: how sampling talks to the transformer."""

    def __init__(self, model_config: "SanaModelConfig", device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=ComfySana)
        if model_config.unet_config["config"].guidance_embed:
            self.model_sampling = SprintSampling(model_config)
        self.prepared_contexts = PreparedContexts()
        network = self.diffusion_model
        self.packed = PackedCalls(network, super(ComfySana, network).forward)
        self.graphs: GraphedCalls | None = GraphedCalls(network, self.packed)

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006, core's signature
        """Denoised x. Remembers the features as core made them, since wrappers around _apply_model may change them."""
        options = {**transformer_options, CONTEXT: c_crossattn}
        return super().apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        options = dict(transformer_options)
        perturbed = options.pop(PERTURBED, None)
        if perturbed is None:
            return self._predict(x, t, c_concat, c_crossattn, control, options, **kwargs)

        def predict(rows: Rows, options: dict) -> Tensor:
            inputs = {name: rows.inputs(value) for name, value in kwargs.items()}
            inputs["captions"] = rows.ids(kwargs["captions"])
            context = rows.inputs(c_crossattn)
            if options.get(CONTEXT) is c_crossattn:
                options[CONTEXT] = context
            controls = control and {CONTROL: tuple(rows.control(one) for one in sana_controls(control))}
            return self._predict(rows.all(x), rows.all(t), rows.inputs(c_concat), context, controls, options, **inputs)

        return predict_parts(perturbed, options, len(x), predict)

    def _predict(self, x, t, c_concat, c_crossattn, control, options: dict, captions=(), **kwargs) -> Tensor:
        made = options.pop(CONTEXT, None)
        if c_crossattn is not None and made is c_crossattn and captions and self._keeps_context(options):
            mask, controls, stay = kwargs.get("attention_mask"), sana_controls(control), self._keeps_weights(options)
            options[CONTEXT] = self._prepare_context(x.device, c_crossattn, mask, captions, controls, absorb=stay)
            if control is None and stay:
                options[CALLS] = self.packed if self.graphs is None else self.graphs
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _keeps_context(self, options: dict) -> bool:
        """Whether captions and weights stay as they are for all steps of the run, and there is memory to spare."""
        patcher = self.current_patcher
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        return bool(
            patcher is not None
            and patcher.current_hooks is None
            and patcher.forced_hooks is None
            and not self.model_lowvram
            and "model_function_wrapper" not in patcher.model_options
            and not comfy.patcher_extension.get_all_wrappers(kind, options)
            and not torch.is_grad_enabled()
        )

    def _keeps_weights(self, options: dict) -> bool:
        """Whether, on top of `_keeps_context`, a step does what the last one did, with the weights where they are."""
        patcher = self.current_patcher
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        return bool(
            not patcher.is_dynamic()
            and not any(key.partition(".")[0] == "diffusion_model" for key in patcher.object_patches)
            # All layers come from one class of core's, which says whether it casts weights at each use.
            and not self.diffusion_model.x_embedder.proj.comfy_cast_weights
            and not options.get("patches_replace")
            and not options.get("optimized_attention_override")
            and not comfy.patcher_extension.get_all_wrappers(kind, options)
        )

    def _prepare_context(
        self,
        device,
        context: Tensor,
        mask: Tensor | None,
        captions: tuple,
        controls: Sequence[Control],
        *,
        absorb: bool,
    ) -> ContextCache:
        dtype = self.get_dtype_inference()
        nets = kept_nets(controls)
        # Inference tensors cannot be met by a later step that is not in inference mode itself.
        weights = (self.current_weight_patches_uuid, self.diffusion_model.dtype, torch.is_inference_mode_enabled())
        versions = ((net, net.current_weight_patches_uuid) for net in nets)
        prepare = self.diffusion_model.prepare_context
        return self.prepared_contexts.get(
            captions,
            (*weights, dtype, device, context.shape, absorb, *versions),
            lambda: prepare(context.to(device, dtype), mask, nets, absorb=absorb),
        )

    def process_timestep(self, timestep, **_):
        """Timesteps in 0..1000 whatever ModelSamplingAuraFlow or ModelSamplingFlux, who use 0..1, were put in.

        In 0..1 for Sprint.
        """
        largest = 1.0 if self.diffusion_model.config.guidance_embed else 1000.0
        return timestep * (largest / getattr(self.model_sampling, "multiplier", 1.0))

    def extra_conds(self, **kwargs) -> dict:
        """Caption features and their mask. Raises ValueError for a conditioning that is not for this model."""
        out = super().extra_conds(**kwargs)
        config = self.diffusion_model.config
        if config.guidance_embed:
            if SPRINT_GUIDANCE not in kwargs:
                raise ValueError(
                    "This is a Sana-Sprint model, which flow samplers cannot sample. Use the Sana Sprint Sampler "
                    "instead, or load a base model."
                )
            # A constant, since core casts tensors to the weights' dtype.
            out["guidance"] = comfy.conds.CONDConstant(float(kwargs[SPRINT_GUIDANCE]))
        context = kwargs.get("cross_attn")
        if context is None or context.shape[-1] != config.caption_channels:
            found = "no text features" if context is None else f"text features of width {context.shape[-1]}"
            raise ValueError(
                f"The conditioning has {found}, this Sana model reads width {config.caption_channels}. Encode the "
                "prompt with the text encoder that belongs to the model: 2304 is Gemma-2-2b, 192 that of sana-nano."
            )
        require_finite(context, "the text encoder")
        # Not CONDCrossAttn, which repeats the shorter of two captions: with a mask that changes the result.
        out["c_crossattn"] = comfy.conds.CONDRegular(context)
        out["captions"] = CaptionIds()
        mask = kwargs.get("attention_mask")
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(_fitted_mask(mask, context.shape[1]))
        return out

    def process_latent_in(self, latent):
        """Scale latents for sampling. Raises FloatingPointError for NaN."""
        return super().process_latent_in(require_finite(latent, "whatever made the latent to sample from"))

    def process_latent_out(self, latent):
        """Unscale sampled latents. Raises FloatingPointError for NaN, so that no black picture follows."""
        return super().process_latent_out(require_finite(latent, "the Sana transformer"))


def _fitted_mask(mask: Tensor, length: int) -> Tensor:
    """Mask [B, length] of 0 and 1. Captions that ConditioningConcat appended have no mask: they are attended to."""
    mask = (mask > 0.5).long()[:, :length]
    return pad(mask, (0, length - mask.shape[1]), value=1)


class SanaModelConfig(comfy.supported_models_base.BASE):
    """What core asks a model family for."""

    unet_extra_config = {}
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, config: SanaConfig):
        self.latent_format = lambda: SanaLatent(_autoencoder_of(config))  # the base class calls it
        # Sprint has no shift, and takes its timesteps in 0..1.
        self.sampling_settings = {"shift": 1.0, "multiplier": 1.0} if config.guidance_embed else {"shift": config.shift}
        super().__init__({"image_model": "sana", "config": config})
        # Core takes the first that the device is fast in. The models that were trained in float16 are safe in it,
        # since they clamp; others overflow.
        trained_in = [torch.float16] if config.dtype == "float16" else []
        self.supported_inference_dtypes = [*trained_in, torch.bfloat16, torch.float32]
        # An estimate in core's unit from the widest activations, those of the feed-forward: 4 for the 1.6B model.
        self.memory_usage_factor = config.hidden_size * config.mlp_ratio / 1400

    def get_model(self, state_dict, prefix="", device=None) -> SanaModel:
        """The MODEL's model, without weights."""
        return SanaModel(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict):
        """Add the configuration, which shapes do not tell in full, as a tensor: core drops the file's metadata."""
        state_dict = {**state_dict, "sana_config": config_tensor(self.unet_config["config"])}
        return super().process_unet_state_dict_for_saving(state_dict)


def _autoencoder_of(config: SanaConfig) -> str:
    """Whose latents a transformer draws, as far as its text encoder's width tells."""
    nano = config.caption_channels == TRANSFORMERS["sana-nano"].caption_channels
    return "dc-ae-nano" if nano else "dc-ae-f32c32-sana"


def load_model(
    path: str | Path,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    cuda_graph: bool | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Load a Sana transformer, a file or a folder, as ComfyUI's MODEL.

    variant: name of a preset, where file and shapes cannot tell; None detects it.
    dtype: of the weights; None lets ComfyUI choose. Layers that the file has in 8 bits with scales stay so.
    cuda_graph: whether steps may be repeated from CUDA graphs, for which the weights must stay where they are. True
        loads without core's dynamic memory, which moves them; None takes graphs where it is not in use.
    disable_dynamic: core's wish for a plain patcher.
    """
    config, state_dict = read_transformer(path, variant=variant, keep_quantized=True)
    expected = SanaTransformer(config, device="meta").state_dict()
    check_weights(without_scales(state_dict), {key: tuple(tensor.shape) for key, tensor in expected.items()}, path)
    if dtype == torch.float16 and config.dtype != "float16":
        log.warning("%s was trained in %s and may overflow in float16; dtype auto avoids that", path, config.dtype)
    model_config = SanaModelConfig(config)
    arguments = (path, variant, dtype, cuda_graph)
    scaled = bool(scaled_layers(state_dict))
    if scaled:
        model_config.quant_config = {"mixed_ops": True}  # what core's own detection says of such files
        dtype = None if dtype is not None and dtype.itemsize == 1 else dtype
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    supported = model_config.supported_inference_dtypes
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=supported,
            weight_dtype=None if scaled else comfy.utils.weight_dtype(state_dict),
        )
        if not scaled and chooses_for_cpu(load_device, dtype, args.fp32_unet):
            dtype = fast_dtype(comfy.utils.calculate_parameters(state_dict), getattr(torch, config.dtype))
    cast_to = None
    if not (dtype == torch.bfloat16 and not scaled and computes_on_cpu(load_device)):
        cast_to = comfy.model_management.unet_manual_cast(None if scaled else dtype, load_device, supported)
    model_config.set_inference_dtype(dtype, cast_to, device=load_device)
    model = model_config.get_model(state_dict)
    if cuda_graph is False:
        model.graphs = None
    stays = disable_dynamic or cuda_graph
    patcher_type = comfy.model_patcher.ModelPatcher if stays else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_type(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state_dict, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, arguments)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, _drop_calls)
    return patcher


def _drop_calls(patcher: comfy.model_patcher.ModelPatcher, unpatch_all: bool) -> None:
    """Their memory is to be free when core unloads the model, and not merely puts another clone in its place."""
    if unpatch_all:
        for calls in filter(None, (patcher.model.packed, patcher.model.graphs)):
            calls.drop()
