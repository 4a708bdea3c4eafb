"""The transformer against diffusers' SanaTransformer2DModel, with the same random weights carried over as files."""

import copy
from dataclasses import replace

import pytest
import torch

from sana_core.config import TRANSFORMERS
from sana_core.models import layers
from sana_core.models.layers import AbsorbedKeysValues, position_embedding
from sana_core.models.sana import Perturbation, SanaTransformer, drop_padding
from sana_core.training.lora import add_adapters
from tests import twin

PUBLISHED = [name for name in TRANSFORMERS if name != "sana-nano"]


def small(name):
    """The preset with three narrow blocks and its own switches."""
    return replace(TRANSFORMERS[name], depth=3, hidden_size=192, num_cross_heads=4, caption_channels=64, pag_layer=None)


def random_transformer(config):
    """A transformer with every weight random; weights of norms stay about 1."""
    generator = torch.Generator().manual_seed(0)
    model = SanaTransformer(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            weights_of_norm = tensor.ndim == 1 and tensor.mean() == 1
            tensor.copy_(1 + 0.2 * noise if weights_of_norm else tensor.std().nan_to_num(0.1) * noise)
    return model


def inputs(config, height, width, tokens=20, lengths=(20, 7)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, height, width, generator=generator)
    context = torch.randn(2, tokens, config.caption_channels, generator=generator)
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    timestep = torch.tensor([0.875, 0.25]) if config.guidance_embed else torch.tensor([999.0, 250.0])
    guidance = torch.tensor([4.5, 2.0]) if config.guidance_embed else None
    return x, timestep, context, mask, guidance


def compare(config, folder, size, tolerance, **kwargs):
    model = random_transformer(config)
    reference = twin.transformer(model, folder)
    x, timestep, context, mask, guidance = inputs(config, *size, **kwargs)
    with torch.no_grad():
        ours = model(x, timestep, context, mask, guidance)
        theirs = reference(
            x,
            context,
            timestep * config.timestep_scale,
            guidance=None if guidance is None else guidance * 0.1,
            encoder_attention_mask=mask,
        ).sample
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert theirs.abs().max() > 0.1, "the comparison needs an output worth comparing"
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [(6, 6), (4, 9)], ids=["square", "wide"])
def test_output_agrees_with_diffusers(name, size, tmp_path):
    compare(small(name), tmp_path, size, 2e-6)


@pytest.mark.slow
def test_full_size_agrees_with_diffusers(tmp_path):
    compare(TRANSFORMERS["Sana_600M_512px"], tmp_path, (16, 16), 2e-6, tokens=300, lengths=(300, 12))


def test_prepared_context_gives_the_same_output():
    config = small("SANA1.5_1.6B_1024px")
    model = random_transformer(config)
    x, timestep, context, mask, _ = inputs(config, 4, 6)
    with torch.no_grad():
        assert torch.equal(model(x, timestep, model.prepare_context(context, mask)), model(x, timestep, context, mask))


def attended(model, dtype=torch.float64, **options):
    """Velocities with captions of 20 and 7 tokens, prepared as the options say."""
    x, timestep, context, mask, guidance = inputs(model.config, 4, 6)
    x, context = x.to(dtype), context.to(dtype)
    with torch.no_grad():
        prepared = model.to(dtype).prepare_context(context, mask, **options)
        return prepared, model(x, timestep, prepared, guidance=guidance)


def test_absorbed_projections_are_as_near_to_float64():
    model = random_transformer(small("Sana_600M_1024px"))
    truth = attended(copy.deepcopy(model))[1]
    plain = attended(model, torch.float32)[1]
    prepared, absorbed = attended(model, torch.float32, absorb=True)
    assert all(isinstance(one, AbsorbedKeysValues) for one in prepared.keys_values)
    assert not torch.equal(absorbed, plain)
    assert (absorbed - truth).norm() < 1.2 * (plain - truth).norm() < 1e-5 * truth.norm()


def test_absorbed_captions_can_be_picked():
    """As perturbed rows and unguided steps do."""
    model = random_transformer(small("Sana_600M_1024px"))
    prepared, expected = attended(model, torch.float32, absorb=True)
    x, timestep, *_ = inputs(model.config, 4, 6)
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        picked = model(x[index], timestep[index], prepared.rows(index))
    assert (picked - expected[index]).abs().max() < 1e-6 * expected.abs().max()


def test_perturbed_rows_read_absorbed_captions():
    model = random_transformer(small("Sana_600M_1024px"))
    x, timestep, context, mask, _ = inputs(model.config, 4, 6)
    with torch.no_grad():
        plain, absorbed = (
            model(x, timestep, model.prepare_context(context, mask, absorb=absorb), perturbation=Perturbation((1,), 1))
            for absorb in (False, True)
        )
    assert len(absorbed) == 3 and (absorbed - plain).abs().max() < 5e-6 * plain.abs().max()


def absorbs(model, batch=1, tokens=20):
    context = torch.zeros(batch, tokens, model.config.caption_channels, dtype=model.dtype)
    with torch.no_grad():
        prepared = model.prepare_context(context, absorb=True).keys_values
    (kind,) = set(map(type, prepared))
    return kind is AbsorbedKeysValues


def test_absorption_does_not_cost_more_than_it_saves():
    """A head is 48 wide."""
    model = random_transformer(small("Sana_600M_1024px"))
    assert absorbs(model, tokens=47) and not absorbs(model, tokens=48)
    assert absorbs(model, batch=4, tokens=24) and not absorbs(model, batch=4, tokens=25)


def test_nothing_is_absorbed_where_the_result_would_not_be_the_same():
    assert not absorbs(random_transformer(small("SANA1.5_1.6B_1024px"))), "queries have a norm"
    model = random_transformer(small("Sana_600M_1024px"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not absorbs(model)
    assert not absorbs(copy.deepcopy(model).bfloat16())
    hooks = [block.cross_attn.proj.register_forward_hook(lambda *_: None) for block in model.blocks]
    assert not absorbs(model)
    for one in hooks:
        one.remove()
    assert absorbs(model)
    add_adapters(model, 4)
    assert not absorbs(model)


def test_rows_of_a_large_batch_pass_the_feed_forward_apart(monkeypatch):
    model = random_transformer(small("Sana_600M_1024px"))
    arguments = inputs(model.config, 4, 6)[:4]
    with torch.no_grad():
        together = model(*arguments)
        monkeypatch.setattr(layers, "AT_ONCE", 0)
        seen = []
        model.blocks[0].mlp.point_conv.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        apart = model(*arguments)
    assert seen == [1, 1] and (apart - together).abs().max() < 2e-6 * together.abs().max()


def test_padding_has_no_influence():
    config = small("Sana_600M_1024px")
    model = random_transformer(config)
    x, timestep, context, mask, _ = inputs(config, 4, 6)
    other = context.masked_fill(mask[:, :, None] == 0, 100.0)
    with torch.no_grad():
        assert torch.equal(model(x, timestep, context, mask), model(x, timestep, other, mask))


def test_drop_padding_keeps_scattered_tokens():
    context = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    shortened, kept = drop_padding(context, mask)
    assert shortened[0, :, 0].tolist() == [0, 3, 4]
    assert shortened[1, 0, 0] == 6
    assert kept.tolist() == [[True, True, True], [True, False, False]]


def test_equal_lengths_need_no_mask():
    _, kept = drop_padding(torch.zeros(2, 6, 1), torch.tensor([[1, 1, 0, 0, 0, 0]] * 2))
    assert kept is None


def test_empty_mask_is_refused():
    with pytest.raises(ValueError, match="all zero"):
        drop_padding(torch.zeros(1, 4, 1), torch.zeros(1, 4))


def test_guidance_where_it_does_not_belong_is_refused():
    for name, guidance, words in (
        ("Sana_600M_1024px", torch.tensor([4.5, 4.5]), "takes no embedded guidance"),
        ("Sana_Sprint_0.6B_1024px", None, "needs embedded guidance"),
    ):
        config = small(name)
        x, timestep, context, mask, _ = inputs(config, 2, 2)
        with pytest.raises(ValueError, match=words):
            random_transformer(config)(x, timestep, context, mask, guidance)


def test_position_embedding_depends_on_height_and_width():
    """Not on the count of tokens, by which the official code reuses it."""
    config = small("Sana_1600M_2Kpx_BF16")
    wide = position_embedding(config, 2, 8, torch.device("cpu"))
    tall = position_embedding(config, 8, 2, torch.device("cpu"))
    assert wide.shape == tall.shape == (16, config.hidden_size)
    assert not torch.allclose(wide, tall)


@pytest.mark.parametrize("name, clamps", [("Sana_1600M_1024px", True), ("SANA1.5_1.6B_1024px", False)])
def test_self_attention_is_clamped_for_the_models_trained_so(name, clamps):
    model = random_transformer(small(name))
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.bias.fill_(1e6)
        out = attention(torch.randn(1, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(2)))
    assert (out.max() == 65504) == clamps


def test_published_parameter_counts():
    """In millions, as the shapes of the published files add up."""
    counts = {"Sana_600M_1024px": 591.75, "Sana_1600M_1024px": 1604.46, "SANA1.5_4.8B_1024px": 4721.83}
    for name, millions in counts.items():
        model = SanaTransformer(TRANSFORMERS[name], device="meta")
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_the_feed_forward_sees_one_picture_as_channels_last():
    """Strides of a single row can hide it from convolutions, which then copy and compute plane by plane."""
    config = small("Sana_600M_1024px")
    feed_forward = random_transformer(config).blocks[0].mlp
    seen = []
    feed_forward.depth_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    with torch.no_grad():
        feed_forward(torch.randn(1, 24, config.hidden_size), 4, 6)
    channels = 2 * int(config.hidden_size * config.mlp_ratio)
    assert seen == [(24 * channels, 1, 6 * channels, channels)]
