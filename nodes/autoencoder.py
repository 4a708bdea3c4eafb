"""Pictures to latents and back."""

import logging

from comfy_api.latest import io, ui

log = logging.getLogger(__name__)


class SanaDCAEDecode(io.ComfyNode):
    """Latent to picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and their help."""
        return io.Schema(
            node_id="SanaDCAEDecode",
            display_name="Sana DC-AE Decode",
            category="sana/latent",
            description="Turns a latent into a picture, whole or in tiles.",
            search_aliases=["vae decode", "vae decode tiled", "latent to image"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latent from a sampler."),
                io.Vae.Input("vae", tooltip="Autoencoder from Load Sana DC-AE."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    optional=True,
                    min=0,
                    max=8192,
                    step=32,
                    tooltip="Pixels a side of the tiles, for large pictures on small GPUs. 0 decodes the picture "
                    "whole, and in tiles of 1024 only when memory runs out. Tiles below 1024 show on skies.",
                ),
                io.Int.Input(
                    "overlap",
                    default=128,
                    optional=True,
                    min=32,
                    max=4096,
                    step=32,
                    advanced=True,
                    tooltip="Pixels over which neighbouring tiles blend.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size=0, overlap=128) -> io.NodeOutput:
        """Pictures [B, H, W, 3] in 0..1."""
        latent = samples["samples"]
        if tile_size == 0:
            return io.NodeOutput(vae.decode(latent))
        compression = vae.spacial_compression_decode()
        tile = max(2, tile_size // compression)
        image = vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=max(1, overlap // compression))
        return io.NodeOutput(image)


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
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="Latent for Sana Sampler, with denoise below 1."
                )
            ],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        """The latent, and what was cropped as text for the user interface."""
        compression = vae.spacial_compression_encode()
        latent = vae.encode(pixels)
        notice = _crop_notice(pixels.shape[1], pixels.shape[2], compression)
        if notice is None:
            return io.NodeOutput({"samples": latent})
        log.warning("%s", notice)
        return io.NodeOutput({"samples": latent}, ui=ui.PreviewText(notice))


def _crop_notice(height: int, width: int, compression: int) -> str | None:
    cropped = width // compression * compression, height // compression * compression
    if cropped == (width, height):
        return None
    return (
        f"The picture was cropped from {width}x{height} to {cropped[0]}x{cropped[1]} px, since the autoencoder needs "
        f"multiples of {compression}. Scale it to such a size first to keep all of it."
    )
