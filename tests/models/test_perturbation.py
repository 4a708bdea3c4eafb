"""Perturbed self-attention against diffusers' PAG processors, and against a whole perturbed pass."""

from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
)

from sana_core.checkpoint import save_transformer
from sana_core.config import TRANSFORMERS
from sana_core.kernels import REFERENCE
from sana_core.models.sana import Perturbation
from tests import tiny


def random_transformer(name):
    """The preset with four narrow blocks and its own switches."""
    return tiny.transformer(
        **{field: getattr(TRANSFORMERS[name], field) for field in ("qk_norm", "pos_embed_base")}, depth=4
    )


def inputs(rows=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 32, 4, 6, generator=generator)
    context = torch.randn(rows, 9, tiny.CHANNELS, generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 6][:rows])[:, None]).long()
    return x, torch.tensor([999.0, 250.0, 500.0][:rows]), context, mask


def predict(model, arguments, layers=None, rows=1):
    with torch.no_grad():
        return model(*arguments, perturbation=None if layers is None else Perturbation(layers, rows))


def again(arguments, rows=1):
    """The arguments as diffusers wants them, with a whole copy of the last rows."""
    return [torch.cat([part, part[-rows:]]) for part in arguments]


def diffusers_twin(model, folder, processor, layers):
    save_transformer(model, folder, layout="diffusers")
    twin = SanaTransformer2DModel.from_pretrained(folder).eval()
    for block in twin.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6  # the authors'
    for layer in layers:
        twin.transformer_blocks[layer].attn1.set_processor(processor())
    return twin


def ask(twin, arguments):
    x, timestep, context, mask = arguments
    with torch.no_grad():
        return twin(x, context, timestep, encoder_attention_mask=mask).sample


def assert_close(ours, theirs, tolerance=3e-6):
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("layers", [(1,), (0,), (2, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["Sana_600M_1024px", "Sana_1600M_2Kpx_BF16"])
def test_guided_by_a_caption_agrees_with_diffusers(name, layers, tmp_path):
    """Rows [uncond, cond, perturbed]."""
    model = random_transformer(name)
    twin = diffusers_twin(model, tmp_path, PAGCFGSanaLinearAttnProcessor2_0, layers)
    ours, theirs = predict(model, inputs(), layers), ask(twin, again(inputs()))
    assert_close(ours, theirs)
    assert (theirs[2] - theirs[1]).abs().max() > 0.01 * theirs.abs().max(), "the perturbation must show"


def test_without_a_second_caption_agrees_with_diffusers(tmp_path):
    """Rows [cond, perturbed], as at a guidance scale of 1."""
    model = random_transformer("Sana_600M_1024px")
    twin = diffusers_twin(model, tmp_path, PAGIdentitySanaLinearAttnProcessor2_0, (1,))
    assert_close(predict(model, inputs(1), (1,)), ask(twin, again(inputs(1))))


def test_query_and_key_norms_stay_in_a_perturbed_layer(tmp_path):
    """Diffusers' PAG processors leave them out in the rows that are not perturbed, where the authors have them."""
    model = random_transformer("SANA1.5_1.6B_1024px")
    ours = predict(model, inputs(), (1,))
    assert_close(ours[:2], ask(diffusers_twin(model, tmp_path, None, ()), inputs()))
    theirs = ask(diffusers_twin(model, tmp_path, PAGCFGSanaLinearAttnProcessor2_0, (1,)), again(inputs()))
    assert_close(ours[2:], theirs[2:])
    assert (ours[:2] - theirs[:2]).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("name", ["Sana_600M_1024px", "SANA1.5_1.6B_1024px"])
@pytest.mark.parametrize("layers, rows", [((2,), 1), ((1, 3), 2), ((0,), 3)])
def test_shared_blocks_give_what_a_whole_perturbed_pass_gives(name, layers, rows):
    model = random_transformer(name)
    out, plain = predict(model, inputs(3), layers, rows), predict(model, inputs(3))
    for layer in layers:
        model.blocks[layer].attn.kernels = replace(REFERENCE, linear_attention=lambda q, k, v, *_: v)
    separate = predict(model, [part[-rows:] for part in inputs(3)])
    assert_close(out, torch.cat([plain, separate]))


def test_rows_are_added_at_the_first_perturbed_block():
    """Before it nothing is computed twice, and linear attention never sees a perturbed row."""
    model, rows = random_transformer("Sana_600M_1024px"), []

    def linear_attention(q, *others):
        rows.append(len(q))
        return REFERENCE.linear_attention(q, *others)

    for block in model.blocks:
        block.attn.kernels = replace(REFERENCE, linear_attention=linear_attention)
    predict(model, inputs(), (2, 1), rows=1)
    assert rows == [2, 2, 2, 3]


def test_the_clamp_holds_for_perturbed_rows():
    model = random_transformer("Sana_1600M_1024px")
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.bias.fill_(1e6)
        out = attention(torch.randn(2, 5, model.config.hidden_size), perturbed_rows=1)
    assert (out == 65504).all()


def test_a_prepared_context_is_cut_to_its_last_rows():
    model = random_transformer("Sana_600M_1024px")
    x, timestep, context, mask = inputs(3)
    cache = model.prepare_context(context, mask).rows(slice(-2, None))
    assert_close(predict(model, (x[1:], timestep[1:], cache)), predict(model, [part[1:] for part in inputs(3)]))


@pytest.mark.parametrize(
    "layers, rows, message",
    [
        ((4,), 1, r"blocks \[4\]: expected one or more of 0 to 3.*Its own choice is 2"),
        ((1, -1), 1, "0 to 3"),
        ((), 1, r"blocks \[\]: expected one or more"),
        ((1,), 3, "3 rows of a batch of 2"),
        ((1,), 0, "0 rows of a batch of 2"),
    ],
)
def test_what_is_not_there_cannot_be_perturbed(layers, rows, message):
    with pytest.raises(ValueError, match=message):
        predict(random_transformer("Sana_600M_1024px"), inputs(), layers, rows)


def test_the_models_own_layer():
    own = {name: config.perturbed_layers() for name, config in TRANSFORMERS.items()}
    assert own["Sana_1600M_1024px"] == own["SANA1.5_4.8B_1024px"] == (8,)
    assert own["Sana_600M_512px"] == (14,)
    assert own["sana-nano"] == (4,)
