"""The Sana transformer (arXiv:2410.10629): 1.0, 1.5 (arXiv:2501.18427) and Sprint (arXiv:2503.09641).

Attribute names are the keys of the published checkpoints (NVlabs/Sana `sana_multi_scale.py`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import SanaConfig
from ..kernels import REFERENCE, Kernels
from .controlnet import Control, SanaControlNet, repeat_last
from .layers import (
    AbsorbedKeysValues,
    CaptionEmbedder,
    FinalLayer,
    KeysValues,
    PatchEmbed,
    SanaBlock,
    TimestepEmbedder,
    each,
    position_embedding,
)

GUIDANCE_SCALE = 0.1  # Sprint embeds a tenth of the guidance scale


@dataclass(frozen=True)
class ContextCache:
    """What all steps of a prompt share: each block's cross-attention keys and values, without the padding.

    Those of ControlNets count for the weights that they were prepared with.
    """

    features: Tensor  # [B, L, C], the embedded captions
    keys_values: tuple[KeysValues | AbsorbedKeysValues, ...]
    mask: Tensor | None  # [B, L] bool; None where every caption is L long
    branches: dict[SanaControlNet, tuple[KeysValues, ...]] = field(default_factory=dict)  # of the ControlNets prepared

    def each(self, change: Callable[[Tensor], Tensor]) -> "ContextCache":
        """With every tensor changed in the same way."""

        def changed(blocks: tuple) -> tuple:
            return tuple(each(one, change) for one in blocks)

        mask = None if self.mask is None else change(self.mask)
        branches = {net: changed(keys_values) for net, keys_values in self.branches.items()}
        return ContextCache(change(self.features), changed(self.keys_values), mask, branches)

    def rows(self, index: slice | Tensor) -> "ContextCache":
        """The captions of some rows, in the order of the index."""
        return self.each(lambda tensor: tensor[index])

    def of_block(self, index: int, rows: Tensor | None) -> tuple[KeysValues | AbsorbedKeysValues, Tensor | None]:
        """What block `index` reads of some rows, None is all, and their mask."""
        caption = self.keys_values[index]
        if rows is None:
            return caption, self.mask
        return each(caption, lambda tensor: tensor[rows]), None if self.mask is None else self.mask[rows]

    def of_branch(self, net: SanaControlNet) -> tuple[KeysValues, ...]:
        """A ControlNet's keys and values: those prepared, or made now."""
        return self.branches[net] if net in self.branches else net.prepare_context(self.features)


@dataclass(frozen=True)
class Perturbation:
    """The extra rows of perturbed-attention guidance (arXiv:2403.17377).

    They are copies of the last rows of the batch, made where they begin to differ: in front of the first perturbed
    block. In the perturbed blocks their self-attention is the identity, as official Sana has it.
    """

    layers: tuple[int, ...]  # indices of the perturbed blocks
    rows: int  # of the batch, the last ones

    def check(self, config: SanaConfig, batch: int) -> None:
        """Raises ValueError for blocks or rows that are not there."""
        config.perturbed_layers(self.layers)
        if not 1 <= self.rows <= batch:
            raise ValueError(f"{self.rows} rows of a batch of {batch} cannot be perturbed: expected 1 to {batch}.")


class SanaTransformer(nn.Module):
    """Predicts the velocity noise - x0 of a noised latent."""

    def __init__(
        self,
        config: SanaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        operations=nn,
        kernels: Kernels = REFERENCE,
    ):
        """Builds the network.

        Args:
            config: architecture.
            operations: the class or module that Linear, Conv2d and RMSNorm come from.
            kernels: the functions between the layers.
        """
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        size = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config, operations, **factory)
        self.t_embedder = TimestepEmbedder(config, operations, **factory)
        if config.guidance_embed:
            self.cfg_embedder = TimestepEmbedder(config, operations, **factory)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(size, 6 * size, **factory))
        self.y_embedder = CaptionEmbedder(config, operations, **factory)
        self.attention_y_norm = operations.RMSNorm(size, eps=1e-5, **factory)
        self.blocks = nn.ModuleList(SanaBlock(config, operations, kernels, **factory) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, operations, kernels, **factory)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.final_layer.scale_shift_table.dtype

    def prepare_context(
        self,
        context: Tensor,
        mask: Tensor | None = None,
        nets: Collection[SanaControlNet] = (),
        *,
        absorb: bool = False,
    ) -> ContextCache:
        """Computes what all steps of a prompt share.

        Args:
            context: raw text features [B, L, caption_channels].
            mask: [B, L], bool or 0/1, 1 = attend; None attends to all.
            nets: ControlNets to prepare for as well.
            absorb: whether cross-attention may fold its weights into keys and values, which takes less work where
                captions are short. Layers must then compute with their weights as these are now.

        Raises:
            ValueError: a caption has no token to attend to, or a ControlNet is for another model.
        """
        for net in nets:
            net.check_model(self.config)
        context, mask = drop_padding(context, mask)
        context = self.attention_y_norm(self.y_embedder(context))
        keys_values = tuple(block.cross_attn.prepare(context, mask, absorb) for block in self.blocks)
        return ContextCache(context, keys_values, mask, {net: net.prepare_context(context) for net in nets})

    def embed_timestep(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embedding [B, C] of the timestep [B], and of the guidance scale [B] where the model takes one.

        Raises:
            ValueError: guidance is missing, or given to a model that takes none.
        """
        if (guidance is not None) != self.config.guidance_embed:
            takes = "needs" if self.config.guidance_embed else "takes no"
            raise ValueError(f"This model {takes} embedded guidance; guidance is {guidance}. Only Sprint embeds it.")
        t = self.t_embedder(timestep * self.config.timestep_scale, dtype)
        return t if guidance is None else t + self.cfg_embedder(guidance * GUIDANCE_SCALE, dtype)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | ContextCache,
        mask: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        perturbation: Perturbation | None = None,
        control: Sequence[Control] = (),
        recompute: bool = False,
    ) -> Tensor:
        """Predicts the velocity.

        Args:
            x: noised, scaled latent [B, in_channels, h, w].
            timestep: [B], used as given: 0..1000, for Sprint 0..1.
            context: raw text features [B, L, caption_channels], or what `prepare_context` made of them.
            mask: [B, L], bool or 0/1, 1 = attend. Part of a prepared context.
            guidance: [B] guidance scale, Sprint only.
            perturbation: which rows to predict a second time, with perturbed self-attention.
            control: ControlNets, whose effects add up; perturbed rows are controlled like those that they copy.
            recompute: keep only the blocks' inputs for the backward pass, which runs each block again: gradient
                checkpointing (arXiv:1604.06174).

        Returns:
            Velocity, shape of x; with a perturbation [B + rows, in_channels, h, w], the perturbed rows at the end.

        Raises:
            ValueError: a caption has nothing to attend to, guidance, perturbation or control do not fit the model.
        """
        if perturbation is not None:
            perturbation.check(self.config, len(x))
        control = [one for one in control if one.strength]
        for one in control:
            one.check(self.config, x.shape)
        if not isinstance(context, ContextCache):
            context = self.prepare_context(context, mask)
        height, width = x.shape[-2:]
        t = self.embed_timestep(timestep, guidance, x.dtype)
        t0 = self.t_block(t)
        tokens = self.x_embedder(x)
        if self.config.pos_embed_base is not None:
            tokens = tokens + position_embedding(self.config, height, width, x.device).to(tokens)
        layers = () if perturbation is None else perturbation.layers
        branches: list[Iterator[Tensor]] = []
        again: Tensor | None = None  # the rows of the batch, and then those that are perturbed once more
        for index, block in enumerate(self.blocks):
            if control and index == 1:
                captions = context if again is None else context.rows(again)
                branches = [
                    one.residuals(
                        self.x_embedder, tokens, captions.of_branch(one.net), captions.mask, t0, height, width
                    )
                    for one in control
                ]
            if layers and index == min(layers):
                again = torch.arange(len(x) + perturbation.rows, device=x.device)
                again[len(x) :] -= perturbation.rows
                tokens, t, t0 = tokens[again], t[again], t0[again]
            for branch in branches:
                if (residual := next(branch, None)) is not None:
                    tokens = tokens + repeat_last(residual, len(tokens))
            rows = perturbation.rows if index in layers else 0
            inputs = tokens, *context.of_block(index, again), t0, height, width, rows
            tokens = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.final_layer(tokens, t).transpose(1, 2).unflatten(2, (height, width))


def drop_padding(context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Shortens captions [B, L, C] to the longest one's attended tokens; the mask is None where all are that long.

    Attention does not depend on the order of its keys, so attended tokens may move to the front.

    Raises:
        ValueError: a caption has no token to attend to.
    """
    if mask is None:
        return context, None
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    shortest, longest = torch.stack([lengths.min(), lengths.max()]).tolist()
    if shortest == 0:
        raise ValueError("The attention mask of a caption is all zero: attend to one token at least, its first.")
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
    context = context.gather(1, order[:, :, None].expand(-1, -1, context.shape[-1]))
    return context, None if shortest == longest else mask.gather(1, order)
