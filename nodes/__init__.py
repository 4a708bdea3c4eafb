"""The table of contents of the pack: every node, and what happens once when ComfyUI loads it."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .autoencoder import SanaDCAEDecode, SanaDCAEEncode
from .conditioning import SanaPromptEncode
from .controlnet import SanaControlNetApply, SanaControlNetLoader
from .dataset import SanaDataset
from .download import SanaDownloadModel
from .grid import SanaXYGrid, SanaXYValues
from .guidance import SanaPAG
from .latent import SanaEmptyLatent, SanaResolution
from .loaders import SanaDCAELoader, SanaDiffusionModelLoader, SanaTextEncoderLoader
from .lora import SanaLoraLoader
from .prompts import SanaPromptsFromFile
from .replacements import register_replacements
from .sampling import SanaFlowDPMSolver, SanaSampler, SanaScheduler
from .scoring import SanaPickBest, SanaScorerLoader
from .sprint import SanaSprintSampler
from .trainer import SanaTrainer

NODES: list[type[io.ComfyNode]] = [
    SanaDiffusionModelLoader,
    SanaTextEncoderLoader,
    SanaDCAELoader,
    SanaLoraLoader,
    SanaControlNetLoader,
    SanaDownloadModel,
    SanaPromptEncode,
    SanaPromptsFromFile,
    SanaControlNetApply,
    SanaEmptyLatent,
    SanaResolution,
    SanaDCAEEncode,
    SanaDCAEDecode,
    SanaSampler,
    SanaFlowDPMSolver,
    SanaScheduler,
    SanaSprintSampler,
    SanaPAG,
    SanaScorerLoader,
    SanaPickBest,
    SanaXYValues,
    SanaXYGrid,
    SanaDataset,
    SanaTrainer,
]

_MODELS = Path(__file__).parents[1] / "models"


class SanaExtension(ComfyExtension):
    """Registers the nodes, the models that ship with the pack, and what stands for an older pack's nodes."""

    async def on_load(self) -> None:
        """Let every loader of ComfyUI, the stock ones too, list the pack's own small models; replace older nodes."""
        for folder in ("diffusion_models", "text_encoders", "vae"):
            folder_paths.add_model_folder_path(folder, str(_MODELS / folder))
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return list(NODES)


async def comfy_entrypoint() -> SanaExtension:
    """What ComfyUI calls after it has imported the pack."""
    return SanaExtension()
