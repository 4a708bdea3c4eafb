"""Which node stands for a class of ComfyUI_ExtraModels, so that graphs made with that pack open and run."""

from collections.abc import Mapping, Sequence

from comfy_api.latest import ComfyAPI, io

from nodes import NODE_CLASS_MAPPINGS


class OldNode(io.NodeReplace):
    """A replacement whose outputs keep their places.

    The front end keeps the links of an output only if it is mapped. Core's own replacement in a queued prompt needs no
    mapping for outputs that stay where they are, and fails on one: it looks the output's readers up by the input names
    that they had before they were replaced themselves. So only the front end is told about outputs.
    """

    def __init__(
        self,
        old: str,
        new: str,
        inputs: Mapping[str, str],
        widgets: Sequence[str] = (),
        outputs: int = 1,
        values: Mapping[str, object] | None = None,
    ):
        """`inputs`: new name -> old name, only those that every form of the old class has; `values`: new name -> value.

        `widgets` are the old widgets' names in their order, up to the last that `inputs` takes.
        """
        mapping = [{"new_id": name, "old_id": old_name} for name, old_name in inputs.items()]
        mapping += [{"new_id": name, "set_value": value} for name, value in (values or {}).items()]
        super().__init__(new_node_id=new, old_node_id=old, old_widget_ids=list(widgets) or None, input_mapping=mapping)
        self.outputs = outputs

    def as_dict(self) -> dict:
        """What the front end gets."""
        places = [{"new_idx": place, "old_idx": place} for place in range(self.outputs)]
        return super().as_dict() | {"output_mapping": places}


_PROMPT = {"clip": "GEMMA", "text": "text"}
_SIZE = {name: name for name in ("width", "height", "batch_size")}

# Files are mapped although the old names are repositories, which no loader lists: ComfyUI then asks for a file, and
# names the one that was wanted. Number formats and model configurations are left to the loaders, which recognise them.
REPLACEMENTS = [
    OldNode("SanaCheckpointLoader", "SanaDiffusionModelLoader", {"model_name": "ckpt_name"}, ["ckpt_name"]),
    OldNode("GemmaLoader", "SanaTextEncoderLoader", {"text_encoder_name": "model_name"}, ["model_name"]),
    OldNode("ExtraVAELoader", "SanaDCAELoader", {"vae_name": "vae_name"}, ["vae_name"]),
    OldNode("SanaTextEncode", "SanaPromptEncode", _PROMPT, ["text"], values={"use_instruction": True}),
    OldNode("GemmaTextEncode", "SanaPromptEncode", _PROMPT, ["text"], values={"use_instruction": False}),
    OldNode(
        "SanaResolutionSelect",
        "SanaResolution",
        {"base_size": "model", "aspect_ratio": "ratio"},  # SanaResolution reads the old values
        ["model", "ratio"],
        outputs=2,
    ),
    OldNode("EmptySanaLatentImage", "SanaEmptyLatent", _SIZE, list(_SIZE)),
    OldNode("EmptyDCAELatentImage", "SanaEmptyLatent", _SIZE, list(_SIZE)),
    # The size that it noted was read by PixArt only: a node of ComfyUI's that changes nothing at this strength.
    OldNode("SanaResolutionCond", "ConditioningSetAreaStrength", {"conditioning": "cond"}, values={"strength": 1.0}),
    # Our Sprint models bring their own schedule: a node that changes nothing at this scale.
    OldNode("ScmModelSampling", "SanaPAG", {"model": "model"}, values={"scale": 0.0}),
]


async def register_replacements() -> None:
    """Tell a running ComfyUI about the old classes that no pack provides.

    A pack that is loaded later may still bring one; ComfyUI then leaves its nodes alone.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:  # the pack was imported without a server
        return
    for replacement in REPLACEMENTS:
        if replacement.old_node_id not in NODE_CLASS_MAPPINGS:
            await ComfyAPI().node_replacement.register(replacement)
    server.add_on_prompt_handler(complete_old_nodes)


def complete_old_nodes(queued: dict) -> dict:
    """Give old nodes of a workflow that a program wrote the `_meta` that core's replacement fails without."""
    old = {replacement.old_node_id for replacement in REPLACEMENTS}
    for node in queued.get("prompt", {}).values():
        if node.get("class_type") in old:
            node.setdefault("_meta", {})
    return queued
