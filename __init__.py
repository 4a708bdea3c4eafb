"""ComfyUI-Sana: Sana text-to-image models as native ComfyUI nodes. ComfyUI loads the pack through this file."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
