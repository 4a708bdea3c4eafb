"""LoRA files as patches of the MODEL's weights."""

import logging

import comfy.weight_adapter
import folder_paths
from comfy_api.latest import io

from ..sana_core.checkpoint import Lora, read_lora
from ..sana_core.models.lora import LoraLayer
from ..sana_core.models.sana import SanaTransformer
from .notice import notice

log = logging.getLogger(__name__)


class SanaLoraLoader(io.ComfyNode):
    """MODEL and LoRA file to MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaLoraLoader",
            display_name="Load Sana LoRA",
            category="sana/loaders",
            description="Adds a LoRA to a Sana model, whichever trainer wrote the file: diffusers, PEFT, kohya, "
            "OneTrainer, SimpleTuner or ComfyUI. Says how many of its keys matched.",
            search_aliases=["lora", "load lora", "apply lora", "lora loader", "dreambooth"],
            inputs=[
                io.Model.Input("model", tooltip="Model from Load Sana Model, or from another LoRA loader."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="File in models/loras that was trained on a Sana of the same size.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much of the LoRA to add. 1 is what it was trained for, 0 leaves the model as it is.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="The model with the LoRA.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name, strength_model=1.0) -> io.NodeOutput:
        """The patched MODEL. Raises ValueError for a MODEL that is no Sana, CheckpointError for a wrong file."""
        network = model.model.diffusion_model
        if not isinstance(network, SanaTransformer):
            raise ValueError(
                f"The model is a {type(model.model).__name__}, no Sana. Connect one from Load Sana Model, or use "
                "ComfyUI's Load LoRA for this one."
            )
        lora = read_lora(folder_paths.get_full_path_or_raise("loras", lora_name), network.config)
        patched = patch_model(model, lora, strength_model)
        log.log(logging.WARNING if lora.unmatched else logging.INFO, "%s: %s", lora_name, lora.summary)
        return io.NodeOutput(patched, ui=notice(f"{lora_name}: {lora.summary}", cls.hidden))


def patch_model(model, lora: Lora, strength: float):
    """A MODEL of the same weights with the LoRA, which ComfyUI adds when it samples."""
    patched = model.clone()
    patched.add_patches(dict(map(_patch, lora.layers)), strength)
    return patched


def _patch(layer: LoraLayer):
    """The layer as core's patcher takes it: what to patch, and how."""
    key = f"diffusion_model.{layer.key}"
    target = key if layer.rows is None else (key, (0, *layer.rows))
    alpha = layer.scale * layer.down.shape[0]  # core divides it by the rank
    weights = (layer.up, layer.down, alpha, None, None, None)  # none of: middle, DoRA scale, new shape
    return target, comfy.weight_adapter.LoRAAdapter(set(), weights)
