"""Names of the same weights in the official files and in diffusers' files, as one table that is read both ways.

In a rule `#` stands for a block's number and `*` for the last part of a name (weight, bias, running_mean, ...).
An official tensor may be several of diffusers', one below the other along its rows. Nothing is transposed.
Sources: diffusers `scripts/convert_sana_to_diffusers.py` and `convert_dcae_to_diffusers.py`, for the facts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .files import CheckpointError, StateDict


@dataclass(frozen=True)
class Rule:
    """One line of a key map."""

    official: str
    diffusers: tuple[str, ...]
    pointwise: bool = False  # official: a 1x1 convolution [o, i, 1, 1]; diffusers: a linear layer [o, i]

    @cached_property
    def official_pattern(self) -> re.Pattern:
        return _pattern(self.official)

    @cached_property
    def diffusers_patterns(self) -> tuple[re.Pattern, ...]:
        return tuple(map(_pattern, self.diffusers))


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)"))


def _fill(template: str, values: Iterable[str]) -> str:
    values = iter(values)
    return re.sub(r"[#*]", lambda _: next(values), template)


def _rule(official: str, *diffusers: str, pointwise: bool = False) -> Rule:
    return Rule(official, diffusers, pointwise)


_BLOCK = "transformer_blocks.#"
TRANSFORMER_RULES = (
    _rule("x_embedder.proj.*", "patch_embed.proj.*"),
    _rule("t_embedder.mlp.0.*", "time_embed.emb.timestep_embedder.linear_1.*"),
    _rule("t_embedder.mlp.2.*", "time_embed.emb.timestep_embedder.linear_2.*"),
    _rule("t_block.1.*", "time_embed.linear.*"),
    _rule("y_embedder.y_proj.fc1.*", "caption_projection.linear_1.*"),
    _rule("y_embedder.y_proj.fc2.*", "caption_projection.linear_2.*"),
    _rule("attention_y_norm.*", "caption_norm.*"),
    _rule("blocks.#.scale_shift_table", f"{_BLOCK}.scale_shift_table"),
    _rule("blocks.#.attn.qkv.*", *(f"{_BLOCK}.attn1.to_{part}.*" for part in "qkv")),
    _rule("blocks.#.attn.q_norm.*", f"{_BLOCK}.attn1.norm_q.*"),
    _rule("blocks.#.attn.k_norm.*", f"{_BLOCK}.attn1.norm_k.*"),
    _rule("blocks.#.attn.proj.*", f"{_BLOCK}.attn1.to_out.0.*"),
    _rule("blocks.#.cross_attn.q_linear.*", f"{_BLOCK}.attn2.to_q.*"),
    _rule("blocks.#.cross_attn.kv_linear.*", *(f"{_BLOCK}.attn2.to_{part}.*" for part in "kv")),
    _rule("blocks.#.cross_attn.q_norm.*", f"{_BLOCK}.attn2.norm_q.*"),
    _rule("blocks.#.cross_attn.k_norm.*", f"{_BLOCK}.attn2.norm_k.*"),
    _rule("blocks.#.cross_attn.proj.*", f"{_BLOCK}.attn2.to_out.0.*"),
    _rule("blocks.#.mlp.inverted_conv.conv.*", f"{_BLOCK}.ff.conv_inverted.*"),
    _rule("blocks.#.mlp.depth_conv.conv.*", f"{_BLOCK}.ff.conv_depth.*"),
    _rule("blocks.#.mlp.point_conv.conv.*", f"{_BLOCK}.ff.conv_point.*"),
    _rule("final_layer.linear.*", "proj_out.*"),
    _rule("final_layer.scale_shift_table", "scale_shift_table"),
)

# With a guidance embedder, diffusers' module around the timestep embedder is another one, without the "emb" level.
SPRINT_RULES = (
    *(
        replace(rule, diffusers=tuple(name.replace("time_embed.emb.", "time_embed.") for name in rule.diffusers))
        for rule in TRANSFORMER_RULES
    ),
    _rule("cfg_embedder.mlp.0.*", "time_embed.guidance_embedder.linear_1.*"),
    _rule("cfg_embedder.mlp.2.*", "time_embed.guidance_embedder.linear_2.*"),
)

# In official files, but no weights of the model: a table that is computed, the null caption, a training head.
TRANSFORMER_DROPPED = re.compile(r"pos_embed|y_embedder\.y_embedding|logvar_linear\.\w+|sana_config")

# The branch of a ControlNet. Diffusers' file holds copies of the base's embedders as well.
CONTROLNET_RULES = (
    *(
        replace(rule, official=rule.official.replace("blocks.#", "controlnet.#.copied_block"))
        for rule in TRANSFORMER_RULES
    ),
    _rule("controlnet.0.before_proj.*", "input_block.*"),
    _rule("controlnet.#.after_proj.*", "controlnet_blocks.#.*"),
)

# The base, which the official file holds whole and diffusers' file in part: it was frozen in training.
CONTROLNET_DROPPED = re.compile(
    r"(x_embedder|t_embedder|t_block|y_embedder|attention_y_norm|blocks|final_layer)\..+|pos_embed|sana_config"
    r"|(patch_embed|time_embed|caption_projection|caption_norm)\..+"
)


def _dc_ae_block_rules(official: str, diffusers: str) -> tuple[Rule, ...]:
    """Rules of residual and EfficientViT blocks.

    The rows of qkv are interleaved by head (32 of q, 32 of k, 32 of v, ...); diffusers cuts them in three plain parts
    all the same and joins them again before the heads are split, so "to_q" holds no queries.
    """
    attention, feed_forward = f"{official}.context_module.main", f"{official}.local_module.main"
    return (
        _rule(f"{official}.main.conv1.conv.*", f"{diffusers}.conv1.*"),
        _rule(f"{official}.main.conv2.conv.*", f"{diffusers}.conv2.*"),
        _rule(f"{official}.main.conv2.norm.*", f"{diffusers}.norm.*"),
        _rule(f"{attention}.qkv.conv.*", *(f"{diffusers}.attn.to_{part}.*" for part in "qkv"), pointwise=True),
        _rule(f"{attention}.aggreg.#.0.*", f"{diffusers}.attn.to_qkv_multiscale.#.proj_in.*"),
        _rule(f"{attention}.aggreg.#.1.*", f"{diffusers}.attn.to_qkv_multiscale.#.proj_out.*"),
        _rule(f"{attention}.proj.conv.*", f"{diffusers}.attn.to_out.*", pointwise=True),
        _rule(f"{attention}.proj.norm.*", f"{diffusers}.attn.norm_out.*"),
        _rule(f"{feed_forward}.inverted_conv.conv.*", f"{diffusers}.conv_out.conv_inverted.*"),
        _rule(f"{feed_forward}.depth_conv.conv.*", f"{diffusers}.conv_out.conv_depth.*"),
        _rule(f"{feed_forward}.point_conv.conv.*", f"{diffusers}.conv_out.conv_point.*"),
        _rule(f"{feed_forward}.point_conv.norm.*", f"{diffusers}.conv_out.norm.*"),
    )


_ENCODER_BLOCK, _DECODER_BLOCK = "encoder.stages.#.op_list.#", "decoder.stages.#.op_list.#"
_DOWN_BLOCK, _UP_BLOCK = "encoder.down_blocks.#.#", "decoder.up_blocks.#.#"
_DC_AE_RULES = (
    _rule("encoder.project_in.conv.*", "encoder.conv_in.*"),
    _rule("encoder.project_in.conv.conv.*", "encoder.conv_in.conv.*"),
    _rule("encoder.project_out.main.op_list.0.conv.*", "encoder.conv_out.*"),
    _rule("decoder.project_in.main.conv.*", "decoder.conv_in.*"),
    _rule("decoder.project_out.op_list.0.*", "decoder.norm_out.*"),
    _rule("decoder.project_out.op_list.2.conv.*", "decoder.conv_out.*"),
    _rule("decoder.project_out.op_list.2.conv.conv.*", "decoder.conv_out.conv.*"),
    *_dc_ae_block_rules(_ENCODER_BLOCK, _DOWN_BLOCK),
    *_dc_ae_block_rules(_DECODER_BLOCK, _UP_BLOCK),
    _rule(f"{_DECODER_BLOCK}.main.conv.conv.*", f"{_UP_BLOCK}.conv.*"),
)
# Diffusers calls both kinds of downsampling the same; the official names differ.
DC_AE_STRIDED_RULES = (*_DC_AE_RULES, _rule(f"{_ENCODER_BLOCK}.main.conv.*", f"{_DOWN_BLOCK}.conv.*"))
DC_AE_UNSHUFFLE_RULES = (*_DC_AE_RULES, _rule(f"{_ENCODER_BLOCK}.main.conv.conv.*", f"{_DOWN_BLOCK}.conv.*"))

DC_AE_DROPPED = re.compile(r"sana_config")


def transformer_rules(state_dict: StateDict) -> tuple[Rule, ...]:
    """The key map of this transformer, in either layout."""
    sprint = "cfg_embedder.mlp.0.weight" in state_dict or "time_embed.guidance_embedder.linear_1.weight" in state_dict
    return SPRINT_RULES if sprint else TRANSFORMER_RULES


def dc_ae_rules(state_dict: StateDict) -> tuple[Rule, ...]:
    """The key map of this autoencoder, in either layout."""
    down = _pattern(f"{_DOWN_BLOCK}.conv.weight")
    # Before its space-to-depth a convolution goes to a quarter of the next width; a strided one never narrows.
    narrows = any(down.fullmatch(key) and tensor.shape[0] < tensor.shape[1] for key, tensor in state_dict.items())
    official = _pattern(f"{_ENCODER_BLOCK}.main.conv.conv.weight")
    return DC_AE_UNSHUFFLE_RULES if narrows or any(map(official.fullmatch, state_dict)) else DC_AE_STRIDED_RULES


def convert_transformer(state_dict: StateDict, layout: str) -> StateDict:
    """The transformer under the official keys, without what is no weight. `layout`: "official" or "diffusers".

    Keys that no rule knows stay as they are, so that the strict load names them.
    """
    return dict(iterate_transformer(dict(state_dict), layout))


def convert_controlnet(state_dict: StateDict, layout: str) -> StateDict:
    """The branch of a ControlNet under the official keys. Arguments as for `convert_transformer`."""
    return dict(iterate_controlnet(dict(state_dict), layout))


def convert_dc_ae(state_dict: StateDict, layout: str) -> StateDict:
    """The autoencoder under the official keys. Arguments as for `convert_transformer`."""
    return dict(iterate_dc_ae(dict(state_dict), layout))


def iterate_transformer(state_dict: StateDict, layout: str) -> Iterator[tuple[str, Tensor]]:
    """What `convert_transformer` returns, one by one. Empties `state_dict`, so that nothing is in memory twice."""
    return _iterate_official(state_dict, layout, transformer_rules, TRANSFORMER_DROPPED)


def iterate_controlnet(state_dict: StateDict, layout: str) -> Iterator[tuple[str, Tensor]]:
    """What `convert_controlnet` returns, one by one. Empties `state_dict`, so that nothing is in memory twice."""
    return _iterate_official(state_dict, layout, lambda _: CONTROLNET_RULES, CONTROLNET_DROPPED)


def iterate_dc_ae(state_dict: StateDict, layout: str) -> Iterator[tuple[str, Tensor]]:
    """What `convert_dc_ae` returns, one by one. Empties `state_dict`, so that nothing is in memory twice."""
    return _iterate_official(state_dict, layout, dc_ae_rules, DC_AE_DROPPED)


def _iterate_official(
    state_dict: StateDict,
    layout: str,
    rules_of: Callable[[StateDict], tuple[Rule, ...]],
    dropped: re.Pattern,
) -> Iterator[tuple[str, Tensor]]:
    if layout not in ("official", "diffusers"):
        raise CheckpointError(f'The layout {layout!r} is unknown, expected "official" or "diffusers".')
    rules = rules_of(state_dict) if layout == "diffusers" else ()
    parts: dict[str, StateDict] = {}  # official key -> diffusers key -> part
    for key in list(state_dict):
        tensor = state_dict.pop(key)
        rule, official = _official_key(key, rules)
        if dropped.fullmatch(key):
            continue
        if rule is None:
            yield key, tensor
            continue
        group = parts.setdefault(official, {})
        group[key] = tensor
        if len(group) == len(rule.diffusers):
            yield official, _join(rule, official, parts.pop(official))
    for group in parts.values():
        yield from group.items()


def _official_key(key: str, rules: tuple[Rule, ...]) -> tuple[Rule | None, str]:
    for rule in rules:
        for pattern in rule.diffusers_patterns:
            if match := pattern.fullmatch(key):
                return rule, _fill(rule.official, match.groups())
    return None, key


def _join(rule: Rule, official: str, group: dict[str, Tensor]) -> Tensor:
    values = rule.official_pattern.fullmatch(official).groups()
    rows = [group[_fill(name, values)] for name in rule.diffusers]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows)
    return joined[:, :, None, None] if rule.pointwise else joined


def diffusers_names(official: str, rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """What diffusers calls an official weight: several names where it cuts the rows; none for a key without a rule."""
    for rule in rules:
        if match := rule.official_pattern.fullmatch(official):
            return tuple(_fill(name, match.groups()) for name in rule.diffusers)
    return ()


def official_to_diffusers(state_dict: StateDict, rules: tuple[Rule, ...]) -> StateDict:
    """Rename and cut, for saving. Raises CheckpointError for a key that no rule knows."""
    converted: StateDict = {}
    for key, tensor in state_dict.items():
        for rule in rules:
            if match := rule.official_pattern.fullmatch(key):
                break
        else:
            raise CheckpointError(f"Diffusers has no name for {key}; save in the official layout.")
        if rule.pointwise:
            tensor = tensor[:, :, 0, 0]
        count = len(rule.diffusers)
        parts = [tensor] if count == 1 else tensor.chunk(count)  # batch norm's counter has no rows to cut
        for name, part in zip(rule.diffusers, parts, strict=True):
            converted[_fill(name, match.groups())] = part
    return converted
