"""How ComfyUI moves models that are made of plain torch.nn layers."""

import comfy.model_patcher


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that loads its model whole or not at all.

    Core's partial loading leaves layers on the CPU and casts their weights at use, which only the layers of comfy.ops
    can do; a layer of torch.nn would meet inputs on another device.
    """

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """Load everything, whatever memory core would spare."""
        super().load(device_to, lowvram_model_memory=0, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Free nothing, so that core unloads the whole model instead."""
        return 0
