"""Where ComfyUI's attention backends and patches reach into the transformer."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ..sana_core.kernels import QKNorm, best_kernels, reference
from ..sana_core.models.layers import LinearAttention
from ..sana_core.models.sana import SanaTransformer


class Hooks:
    """Functions in the place of some kernels and of the blocks, which look up the patches of the running call.

    Shapes as in `sana_core.kernels.reference`.
    """

    def __init__(self):
        self.options: dict = {}  # the transformer_options of the running call
        self.perturbed_layer: int | None = None
        self.kernels = replace(best_kernels(comfy.model_management.get_torch_device()), attention=self.attention)

    def attach(self, model: SanaTransformer) -> None:
        """Put the hooks in the model that was built with `self.kernels`."""
        self.perturbed_layer = model.config.perturbed_layer
        for index, block in enumerate(model.blocks):
            block.attn.is_plain = is_plain
            block.attn.kernels = replace(self.kernels, linear_attention=partial(self.linear_attention, index))
            block.forward = partial(self.run_block, index, block.forward)

    @contextmanager
    def using(self, options: dict):
        """The patches within the block are those of `options`."""
        self.options = options
        try:
            yield
        finally:
            self.options = {}

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention by the backend that the user started ComfyUI with."""
        if mask is not None:
            # Half of the range: scores that are added cannot overflow, and a chunk that is masked whole has no NaN.
            masked = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min / 2)
            mask = masked[:, None, :].expand(-1, q.shape[1], -1)
        out = optimized_attention(
            q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2], mask=mask, transformer_options=self.options
        )
        return out.unflatten(2, q.shape[2:])

    def linear_attention(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, eps: float, norms: QKNorm | None = None
    ) -> Tensor:
        """Self-attention of block `index`, or what an "attn1" patch puts in its place, which gets normed q and k.

        UNet models call their innermost block ("middle", 0), and core's PerturbedAttentionGuidance patches that one:
        here it means the block that Sana perturbs. ("block", index) names any block.
        """
        patches = self.options.get("patches_replace", {}).get("attn1", {})
        patch = patches.get(("block", index))
        if patch is None and index == self.perturbed_layer:
            patch = patches.get(("middle", 0))
        if patch is None:
            return self.kernels.linear_attention(q, k, v, eps, norms)
        if norms is not None:
            q, k = reference.qk_norm(q, k, norms)
        extra_options = {**self.options, "n_heads": q.shape[2], "dim_head": q.shape[3], "block": ("block", index)}
        return patch(q.flatten(2), k.flatten(2), v.flatten(2), extra_options).unflatten(2, q.shape[2:])

    def run_block(self, index: int, block, tokens, keys_values, mask, t0, *geometry) -> Tensor:
        """Block `index`, or what a "dit" patch puts in its place. `geometry`: height, width, perturbed rows."""
        patches = self.options.get("patches_replace", {}).get("dit", {})
        patch = patches.get(("double_block", index)) or patches.get(("block", index))
        if patch is None:
            return block(tokens, keys_values, mask, t0, *geometry)

        def original_block(args: dict) -> dict:
            return {"img": block(args["img"], args["txt"], mask, args["vec"], *geometry)}

        args = {"img": tokens, "txt": keys_values, "vec": t0, "transformer_options": self.options}
        return patch(args, {"original_block": original_block})["img"]


def is_plain(norm: nn.Module) -> bool:
    """Whether core's norm does what torch's does: it casts, moves and patches no weight when it is called."""
    idle = not any(getattr(norm, name, True) for name in ("comfy_cast_weights", "weight_function", "bias_function"))
    return idle and LinearAttention.is_plain(norm, comfy.ops.disable_weight_init.RMSNorm.forward)
