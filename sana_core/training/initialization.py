"""Weights to train a Sana transformer from scratch with (NVlabs/Sana `sana.py`, `initialize_weights`)."""

import torch
from torch import nn

from ..models.sana import SanaTransformer


@torch.no_grad()
def initialize_weights(model: SanaTransformer) -> None:
    """Fills every weight in place: Xavier-uniform layers, small embedders, and a velocity of zero at the start.

    Unlike upstream, the norm of the caption starts at 1 instead of 0.01: small models learn to read sooner.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedders = [model.t_embedder.mlp, model.t_block, model.y_embedder.y_proj]
    if model.config.guidance_embed:
        embedders.append(model.cfg_embedder.mlp)
    for embedder in embedders:
        for module in embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    for block in model.blocks:
        nn.init.zeros_(block.cross_attn.proj.weight)
    nn.init.zeros_(model.final_layer.linear.weight)
