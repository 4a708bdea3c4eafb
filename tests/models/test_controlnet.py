"""The ControlNet branch against diffusers' modules with the same random weights, and how it joins the transformer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_core.config import CONTROLNETS, TRANSFORMERS
from sana_core.models.controlnet import Control, SanaControlNet
from sana_core.models.sana import Perturbation, SanaTransformer
from tests import tiny, twin

NARROW = {"hidden_size": 192, "num_cross_heads": 4, "caption_channels": 64, "pag_layer": None}
BASES = ("Sana_600M_1024px", "Sana_1600M_1024px_BF16", "SANA1.5_1.6B_1024px", "Sana_1600M_2Kpx_BF16")


def models(name="Sana_1600M_1024px_BF16", depth=5, copies=3):
    config = replace(TRANSFORMERS[name], depth=depth, **NARROW)
    branch = replace(config, depth=copies, pos_embed_base=None)  # the control picture has no position embedding
    return tiny.filled(SanaTransformer(config)), tiny.filled(SanaControlNet(branch))


def inputs(model, rows=2, height=4, width=6, hints=None):
    generator = torch.Generator().manual_seed(3)
    config = model.config
    x = torch.randn(rows, config.in_channels, height, width, generator=generator)
    hint = torch.randn(hints or rows, config.in_channels, height, width, generator=generator)
    context = torch.randn(rows, 9, config.caption_channels, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4, 6][:rows])[:, None]
    timestep = torch.tensor([999.0, 250.0, 400.0])[:rows]
    return x, timestep, context, mask, hint


def relative(one, other):
    scale = other.abs().max()
    assert scale > 0.1, "the comparison needs an output worth comparing"
    return ((one - other).abs().max() / scale).item()


def diffusers_residuals(theirs, base_tokens, hint, context, mask, timestep):
    """Diffusers' own modules in the authors' order, from the tokens behind the base's first block."""
    height, width = hint.shape[-2:]
    t0, _ = theirs.time_embed(timestep, batch_size=len(base_tokens), hidden_dtype=torch.float32)
    caption = theirs.caption_norm(theirs.caption_projection(context))
    bias = (1 - mask.float())[:, None] * -10000.0
    stream = base_tokens + theirs.input_block(theirs.patch_embed(hint))
    for block, project in zip(theirs.transformer_blocks, theirs.controlnet_blocks, strict=True):
        stream = block(stream, None, caption, bias, t0, height, width)
        yield project(stream)


@pytest.mark.parametrize("name", BASES[:2])
def test_residuals_agree_with_diffusers_class(name):
    """Diffusers' whole SanaControlNetModel, which begins at the embedded latent: so ours is begun there."""
    model, net = models(name)
    x, timestep, context, mask, hint = inputs(model)
    theirs = twin.controlnet(net, model)
    with torch.no_grad():
        expected = theirs(x, context, timestep, hint, encoder_attention_mask=mask, return_dict=False)[0]
        cache = model.prepare_context(context, mask)
        t0 = model.t_block(model.embed_timestep(timestep, None, torch.float32))
        tokens = (model.x_embedder(latent) for latent in (x, hint))
        ours = list(net(*tokens, net.prepare_context(cache.features), cache.mask, t0, 4, 6))
    assert len(ours) == len(expected) == 3
    assert max(relative(one, other) for one, other in zip(ours, expected, strict=True)) < 2e-6


@pytest.mark.parametrize("name", [*BASES[:2], BASES[3]])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_agrees_with_diffusers_modules_in_the_authors_order(name, strength, tmp_path):
    """Diffusers' transformer, whose blocks 0, 1 and 2 get the residuals added behind them by hooks."""
    model, net = models(name)
    x, timestep, context, mask, hint = inputs(model)
    base, branch = twin.transformer(model, tmp_path), twin.controlnet(net, model)
    running = []

    def begin(_module, _args, tokens):
        running.append(diffusers_residuals(branch, tokens, hint, context, mask, timestep))

    def add(_module, _args, tokens):
        return tokens + strength * next(running[0])

    base.transformer_blocks[0].register_forward_hook(begin)
    with torch.no_grad():
        for block in base.transformer_blocks[:3]:
            block.register_forward_hook(add)
        expected = base(x, context, timestep, encoder_attention_mask=mask).sample
        ours = model(x, timestep, context, mask, control=[Control(net, hint, strength)])
        plain = model(x, timestep, context, mask)
    assert relative(ours, expected) < 2e-6
    assert relative(ours, plain) > 1e-2


@pytest.mark.slow
def test_full_size_agrees_with_diffusers():
    config = TRANSFORMERS["Sana_600M_1024px"]
    model = tiny.filled(SanaTransformer(replace(config, depth=8)))
    net = tiny.filled(SanaControlNet(CONTROLNETS["Sana_600M_1024px_ControlNet_HED"]))
    x, timestep, context, mask, hint = inputs(model, height=16, width=16)
    theirs = twin.controlnet(net, model)
    with torch.no_grad():
        expected = theirs(x, context, timestep, hint, encoder_attention_mask=mask, return_dict=False)[0]
        cache = model.prepare_context(context, mask)
        t0 = model.t_block(model.embed_timestep(timestep, None, torch.float32))
        keys_values = net.prepare_context(cache.features)
        ours = net(model.x_embedder(x), model.x_embedder(hint), keys_values, cache.mask, t0, 16, 16)
        assert max(relative(one, other) for one, other in zip(ours, expected, strict=True)) < 2e-6


def test_projections_of_zero_change_nothing():
    """As training begins: the branch is there, and the picture is the base's."""
    model, net = models()
    for block in net.controlnet:
        nn.init.zeros_(block.after_proj.weight), nn.init.zeros_(block.after_proj.bias)
    x, timestep, context, mask, hint = inputs(model)
    with torch.no_grad():
        plain = model(x, timestep, context, mask)
        assert torch.equal(model(x, timestep, context, mask, control=[Control(net, hint)]), plain)


def test_strength_zero_does_not_even_run():
    model, net = models()
    x, timestep, context, mask, hint = inputs(model)
    nn.init.constant_(net.controlnet[0].after_proj.bias, float("nan"))
    with torch.no_grad():
        plain = model(x, timestep, context, mask)
        assert torch.equal(model(x, timestep, context, mask, control=[Control(net, hint, 0.0)]), plain)
        assert model(x, timestep, context, mask, control=[Control(net, hint)]).isnan().any()


def test_the_same_control_twice_is_twice_as_strong_behind_the_first_block():
    """The first residual does not depend on how strong any is, so with one copied block strengths add up."""
    model, net = models(depth=2, copies=1)
    x, timestep, context, mask, hint = inputs(model)
    with torch.no_grad():
        chained = model(x, timestep, context, mask, control=[Control(net, hint, 0.3), Control(net, hint, 0.9)])
        once = model(x, timestep, context, mask, control=[Control(net, hint, 1.2)])
    assert relative(chained, once) < 2e-6


def test_each_of_several_controls_counts():
    model, net = models()
    other = tiny.filled(SanaControlNet(replace(net.config, depth=2)))
    x, timestep, context, mask, hint = inputs(model)
    two = [Control(net, hint), Control(other, hint.flip(3), 0.5)]
    with torch.no_grad():
        both = model(x, timestep, context, mask, control=two)
        for alone in (two[:1], two[1:], two[::-1]):
            error = relative(model(x, timestep, context, mask, control=alone), both)
            assert error < 2e-6 if len(alone) == 2 else error > 1e-2


def test_one_hint_serves_the_batch():
    model, net = models()
    x, timestep, context, mask, hint = inputs(model, rows=3, hints=1)
    with torch.no_grad():
        one = model(x, timestep, context, mask, control=[Control(net, hint)])
        each = model(x, timestep, context, mask, control=[Control(net, hint.expand(3, -1, -1, -1))])
    assert relative(one, each) < 2e-6


def test_rows_of_a_batch_keep_their_own_hint_and_caption():
    model, net = models()
    x, timestep, context, mask, hint = inputs(model, rows=3)
    with torch.no_grad():
        batch = model(x, timestep, context, mask, control=[Control(net, hint)])
        for row in range(3):
            i = slice(row, row + 1)
            alone = model(x[i], timestep[i], context[i], mask[i], control=[Control(net, hint[i])])
            assert relative(alone, batch[i]) < 5e-6


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (4,), (0, 3)])
@pytest.mark.parametrize("hints", [1, 3])
def test_perturbed_rows_are_controlled_as_a_batch_of_all_rows_is(layers, hints):
    """The shared prefix of perturbed attention is a saving: computing every row from the start gives the same."""
    model, net = models()
    x, timestep, context, mask, hint = inputs(model, rows=3, hints=hints)
    again = torch.tensor([0, 1, 2, 1, 2])
    whole = hint if hints == 1 else hint[again]
    for index in layers:
        model.blocks[index].attn.register_forward_pre_hook(lambda _module, args: (args[0], 2))
    with torch.no_grad():
        expected = model(x[again], timestep[again], context[again], mask[again], control=[Control(net, whole)])
        for index in layers:
            model.blocks[index].attn._forward_pre_hooks.clear()
        options = {"perturbation": Perturbation(layers, 2), "control": [Control(net, hint)]}
        shared = model(x, timestep, context, mask, **options)
        plain = model(x, timestep, context, mask, control=[Control(net, hint)])
    assert relative(shared, expected) < 5e-6
    assert relative(shared[:3], plain) < 5e-6
    assert relative(shared[3:], plain[1:]) > 1e-3


@pytest.mark.parametrize("name, clamps", [("Sana_600M_1024px", True), ("SANA1.5_1.6B_1024px", False)])
def test_copied_attention_is_clamped_as_the_base_is(name, clamps):
    _, net = models(name)
    attention = net.controlnet[1].copied_block.attn
    with torch.no_grad():
        attention.proj.bias.fill_(1e6)
        assert (attention(torch.zeros(1, 4, 192)).max() == 65504) == clamps


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_narrow_dtypes(dtype, tolerance):
    model, net = models()
    x, timestep, context, mask, hint = inputs(model)
    with torch.no_grad():
        expected = model(x, timestep, context, mask, control=[Control(net, hint)])
        model, net = model.to(dtype), net.to(dtype)
        ours = model(x.to(dtype), timestep, context.to(dtype), mask, control=[Control(net, hint)])
    assert ours.dtype == dtype and relative(ours.float(), expected) < tolerance


@pytest.mark.parametrize(
    "changes, shape, words",
    [
        ({"hidden_size": 128}, (2, 32, 4, 6), "is 128 wide and controls the first 4 blocks; this model is 192 wide"),
        ({"depth": 5}, (2, 32, 4, 6), "controls the first 6 blocks; this model is 192 wide and has 5"),
        ({}, (2, 32, 4, 5), r"\(2, 32, 4, 5\), expected \(2, 32, 4, 6\)"),
        ({}, (3, 32, 4, 6), "shape"),
        ({}, (2, 4, 4, 6), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(changes, shape, words):
    model, net = models()
    x, timestep, context, mask, _ = inputs(model)
    net = SanaControlNet(replace(net.config, **changes), device="meta")
    with pytest.raises(ValueError, match=words):
        model(x, timestep, context, mask, control=[Control(net, torch.zeros(shape))])


def test_published_parameter_counts():
    """Of the branch alone: the elements of diffusers' files less their copies of the embedders, in millions."""
    for name, millions in (
        ("Sana_600M_1024px_ControlNet_HED", 155.15),
        ("Sana_1600M_1024px_BF16_ControlNet_HED", 585.60),
    ):
        net = SanaControlNet(CONTROLNETS[name], device="meta")
        assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 2) == millions
