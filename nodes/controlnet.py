"""ControlNet files, and their pictures in a conditioning."""

import logging

from comfy_api.latest import io

import nodes  # of ComfyUI

from .control import SanaControl, load_control
from .model_files import find_model, list_models
from .notice import notice

log = logging.getLogger(__name__)


class SanaControlNetLoader(io.ComfyNode):
    """ControlNet file to CONTROL_NET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaControlNetLoader",
            display_name="Load Sana ControlNet",
            category="sana/loaders",
            description="Loads a ControlNet for Sana, such as the official HED ones: a .pth or .safetensors file, or "
            "a diffusers folder.",
            search_aliases=["controlnet", "load controlnet", "controlnet loader", "hed", "scribble"],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=list_models("controlnet"),
                    tooltip="File, or folder with a config.json, in models/controlnet. It must have been made for the "
                    "size of the model: 0.6B or 1.6B.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    "control_net",
                    display_name="CONTROL_NET",
                    tooltip="For Apply Sana ControlNet, or ComfyUI's Apply ControlNet with its vae input connected.",
                )
            ],
        )

    @classmethod
    def execute(cls, control_net_name) -> io.NodeOutput:
        """The CONTROL_NET. Raises CheckpointError for a wrong file."""
        return io.NodeOutput(load_control(find_model("controlnet", control_net_name)))


class SanaControlNetApply(io.ComfyNode):
    """ComfyUI's Apply ControlNet with the inputs that Sana needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaControlNetApply",
            display_name="Apply Sana ControlNet",
            category="sana/conditioning",
            description="Makes the model follow the lines of a picture. The same as ComfyUI's Apply ControlNet, with "
            "the VAE that Sana needs as a required input.",
            search_aliases=["controlnet", "apply controlnet", "use controlnet", "hed", "scribble"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What to draw, from Sana Prompt Encode."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What to keep away from. It is controlled like the positive one, as the authors do it.",
                ),
                io.ControlNet.Input("control_net", tooltip="From Load Sana ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip="The lines to follow: white on black for the HED models. It is scaled and cut to the size "
                    "of the latent; one picture serves the whole batch.",
                ),
                io.Vae.Input("vae", tooltip="From Load Sana DC-AE: the picture is encoded with it."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strictly to follow the lines. 1 is what the model was trained for, 0 no control.",
                ),
                _percent("start_percent", 0.0, "From which part of the schedule on it counts; 0 is the first step."),
                _percent("end_percent", 1.0, "Up to which part of the schedule it counts; 1 is the last step."),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="With the control, for a sampler."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="With the control, for a sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, positive, negative, control_net, image, vae, strength=1.0, start_percent=0.0, end_percent=1.0
    ) -> io.NodeOutput:
        """The conditionings with the control. Raises ValueError for a ControlNet or a VAE of another model."""
        if not isinstance(control_net, SanaControl):
            raise ValueError(
                f"The control_net is a {type(control_net).__name__} for another model. Connect Load Sana ControlNet, "
                "or use ComfyUI's Apply ControlNet for this one."
            )
        controlled = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control_net, image, strength, start_percent, end_percent, vae
        )
        if start_percent <= end_percent:
            return io.NodeOutput(*controlled)
        text = f"The control counts nowhere: start_percent {start_percent} is above end_percent {end_percent}."
        log.warning(text)
        return io.NodeOutput(*controlled, ui=notice(text, cls.hidden))


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)
