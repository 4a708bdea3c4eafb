"""Picture sizes and the empty latents to start from."""

from fractions import Fraction

import comfy.model_management
import torch
from comfy_api.latest import io

from ..sana_core.resolution import ASPECT_RATIOS, INFERENCE_ASPECT_RATIOS, Size, check_size, nearest_size

LATENT_CHANNELS = 32
COMPRESSION = 32  # pixels a side of one latent position
MAX_SIDE = 8192
_BASES = list(INFERENCE_ASPECT_RATIOS)


def _label(size: Size) -> str:
    ratio = Fraction(size.width, size.height)
    return f"{ratio.numerator}:{ratio.denominator} ({size})"


# Widest first, named by their size at 1024 px; the other tables are matched by the ratio.
_SIZES = {_label(size): size for size in INFERENCE_ASPECT_RATIOS[1024].values()}
_SQUARE = _label(Size(1024, 1024))

# What graphs of ComfyUI_ExtraModels call them. That pack has the official table with width and height exchanged, the
# entries for training included.
_OLD_BASES = {"512px": 512, "1024px": 1024, "2K": 2048, "4K": 4096, "SanaMS_600M_P1_D28": 1024}
_OLD_BASES |= {"SanaMS_1600M_P1_D20": 1024, "SanaMS_1600M_P1_D20_2K": 2048, "SanaMS_1600M_P1_D20_4K": 4096}
_OLD_SIZES = {f"{ratio:.2f}": size for ratio, size in ASPECT_RATIOS[1024].items()}


class SanaResolution(io.ComfyNode):
    """The official table of picture sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaResolution",
            display_name="Sana Resolution",
            category="sana/latent",
            description="Picks a width and height from the sizes that Sana was trained on.",
            search_aliases=["aspect ratio", "image size", "sana size"],
            inputs=[
                io.Combo.Input(
                    "base_size",
                    options=[str(base) for base in _BASES],
                    default="1024",
                    tooltip="Size that the model was made for, in pixels: 256 for sana-nano, 512, 1024, 2048 or 4096.",
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=list(_SIZES),
                    default=_SQUARE,
                    tooltip="Width to height. The size in brackets is that of a 1024 px model; "
                    "other base sizes take their nearest own entry.",
                ),
            ],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="Width in pixels, a multiple of 32."),
                io.Int.Output("height", display_name="height", tooltip="Height in pixels, a multiple of 32."),
            ],
        )

    @classmethod
    def validate_inputs(cls, base_size: str = "1024", aspect_ratio: str = _SQUARE) -> bool | str:
        """Accept the options, and what they are called in graphs of ComfyUI_ExtraModels."""
        if base_size not in [*map(str, _BASES), *_OLD_BASES]:
            return f"base_size is {base_size!r}; expected one of {', '.join(map(str, _BASES))}"
        if aspect_ratio not in _SIZES.keys() | _OLD_SIZES.keys():
            return f"aspect_ratio is {aspect_ratio!r}; expected one of {', '.join(_SIZES)}"
        return True

    @classmethod
    def execute(cls, base_size: str, aspect_ratio: str) -> io.NodeOutput:
        """Width and height of the table's entry."""
        base = _OLD_BASES.get(base_size) or int(base_size)
        if aspect_ratio in _OLD_SIZES:
            wanted = _OLD_SIZES[aspect_ratio]
            size = nearest_size(wanted.height, wanted.width, ASPECT_RATIOS[base])
            return io.NodeOutput(size.height, size.width)
        wanted = _SIZES[aspect_ratio]
        size = nearest_size(wanted.height, wanted.width, INFERENCE_ASPECT_RATIOS[base])
        return io.NodeOutput(size.width, size.height)


class SanaEmptyLatent(io.ComfyNode):
    """Zeros for text to image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaEmptyLatent",
            display_name="Empty Sana Latent",
            category="sana/latent",
            description="Makes the empty latent that text to image starts from: 32 channels, one position for each "
            "32 x 32 pixels.",
            search_aliases=["empty latent image", "sana latent", "new image size"],
            inputs=[
                _side("width"),
                _side("height"),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Number of pictures made together."),
            ],
            outputs=[io.Latent.Output("latent", display_name="LATENT", tooltip="Empty latent for a Sana model.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        """Zeros [batch_size, 32, height / 32, width / 32]. Raises ValueError for sides off the grid of 32 px."""
        check_size(height, width, COMPRESSION)
        samples = torch.zeros(
            [batch_size, LATENT_CHANNELS, height // COMPRESSION, width // COMPRESSION],
            device=comfy.model_management.intermediate_device(),
            dtype=comfy.model_management.intermediate_dtype(),
        )
        # Without this key KSampler cannot tell that the latent has its final size already.
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": COMPRESSION})


def _side(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=1024,
        min=COMPRESSION,
        max=MAX_SIDE,
        step=COMPRESSION,
        tooltip=f"{name.capitalize()} of the picture in pixels, a multiple of 32. "
        "Sana draws best near the size that it was trained for (256 px for sana-nano).",
    )
