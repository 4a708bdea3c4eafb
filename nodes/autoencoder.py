"""Pictures to latents and back."""

import logging

from comfy_api.latest import io

from .notice import notice
from .vae import TILING, SanaVAE

log = logging.getLogger(__name__)


def _tiling_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "tile_size",
            default=0,
            optional=True,
            min=0,
            max=8192,
            step=32,
            advanced=True,
            tooltip="Pixels a side of the tiles. 0 takes 1024, or less where memory asks for it. The result does not "
            "depend on it.",
        ),
        io.Combo.Input(
            "tiling",
            options=list(TILING),
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Work in tiles: auto does so when memory does not hold the whole. Tiles give the same result in "
            "less memory, a little slower.",
        ),
    ]


def _with_tiling(vae, tiling: str, tile_size: int):
    """The VAE as the inputs want it; one of core's, which knows no exact tiles, as it is."""
    return vae.with_tiling(tiling, tile_size) if isinstance(vae, SanaVAE) else vae


class SanaDCAEDecode(io.ComfyNode):
    """Latent to picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDCAEDecode",
            display_name="Sana DC-AE Decode",
            category="sana/latent",
            description="Turns a latent into a picture. Where memory does not hold it whole, it is done in tiles, with "
            "the same result.",
            search_aliases=["vae decode", "vae decode tiled", "latent to image"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latent from a sampler."),
                io.Vae.Input("vae", tooltip="Autoencoder from Load Sana DC-AE."),
                *_tiling_inputs(),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0, tiling="auto") -> io.NodeOutput:
        """Pictures [B, H, W, 3] in 0..1."""
        return io.NodeOutput(_with_tiling(vae, tiling, tile_size).decode(samples["samples"]))


class SanaDCAEEncode(io.ComfyNode):
    """Picture to latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDCAEEncode",
            display_name="Sana DC-AE Encode",
            category="sana/latent",
            description="Turns a picture into a latent, for image to image. What exceeds a multiple of 32 pixels is "
            "cropped evenly on both sides, with a notice.",
            search_aliases=["vae encode", "image to latent", "img2img"],
            inputs=[
                io.Image.Input("pixels", tooltip="Picture to encode."),
                io.Vae.Input("vae", tooltip="Autoencoder from Load Sana DC-AE."),
                *_tiling_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="Latent for Sana Sampler, with denoise below 1."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pixels, vae, tile_size=0, tiling="auto") -> io.NodeOutput:
        """The latent, and what was cropped as text for the user interface."""
        compression = vae.spacial_compression_encode()
        latent = _with_tiling(vae, tiling, tile_size).encode(pixels)
        cropped = _crop_notice(pixels.shape[1], pixels.shape[2], compression)
        if cropped:
            log.warning("%s", cropped)
        whole = f"{pixels.shape[2]}x{pixels.shape[1]} px"  # takes the place of what another picture left on the node
        return io.NodeOutput({"samples": latent}, ui=notice(cropped or whole, cls.hidden))


def _crop_notice(height: int, width: int, compression: int) -> str | None:
    cropped = width // compression * compression, height // compression * compression
    if cropped == (width, height):
        return None
    return (
        f"The picture was cropped from {width}x{height} to {cropped[0]}x{cropped[1]} px, since the autoencoder needs "
        f"multiples of {compression}. Scale it to such a size first to keep all of it."
    )
