"""The processor's kernels are as near to float64 as the reference, and leave to it what they do not know."""

from dataclasses import replace

import pytest
import torch

from sana_core.kernels import REFERENCE, QKNorm, processor, reference
from sana_core.kernels.processor import PROCESSOR, gated_residual_
from sana_core.models.sana import SanaTransformer
from tests import tiny
from tests.kernels.fused import EXACT, distance

SHAPES = [(1, 63, 3, 8), (1, 63, 3, 32), (2, 500, 1, 32), (1, 1000, 4, 32), (3, 1, 5, 32)]
PICTURES = [(1, 16, 1, 1), (2, 48, 5, 3), (1, 1040, 4, 7), (1, 80, 20, 25)]  # batch, half of the channels, h, w


@pytest.fixture(params=["C", "PyTorch"])
def language(request, monkeypatch):
    """What computes: the functions in C, and what does without a compiler."""
    if request.param == "PyTorch":
        monkeypatch.setattr(processor, "_library", lambda: None)
    elif processor._library() is None:
        pytest.skip("this machine has no C compiler")
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """So many, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(batch, tokens, count, width, dtype=torch.float32):
    """q, k and v as a transformer has them: parts of one tensor."""
    parts = draw(batch, tokens, 3 * count * width, dtype=dtype).chunk(3, dim=-1)
    return [part.unflatten(-1, (count, width)) for part in parts]


def picture(batch, hidden, height, width, dtype=torch.float32):
    """x in channels-last layout, weight and bias of the depthwise convolution, and a bias of x."""
    x = 3 * draw(batch, height, width, 2 * hidden, dtype=dtype).permute(0, 3, 1, 2)
    weight, bias, x_bias = ((2 * hidden, 1, 3, 3), (2 * hidden,), (2 * hidden,))
    return x, *(draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate((weight, bias, x_bias), 1))


def qk_norm(channels):
    return QKNorm(1 + draw(channels, seed=1), 1 + draw(channels, seed=2), 1e-5)


def nearly(found, expected, truth):
    """Whether a result is about as near to float64 as another one."""
    return distance(found, truth) <= max(1.2 * distance(expected, truth), 1e-7)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_linear_attention(shape, normed, language, threads, poisoned):
    given = heads(*shape)
    norms = qk_norm(shape[2] * shape[3]) if normed else None
    truth = EXACT["linear_attention"](*(part.double() for part in given), 1e-8, norms)
    expected = reference.linear_attention(*given, 1e-8, norms)
    found = processor.linear_attention(*given, 1e-8, norms)
    assert found.shape == expected.shape
    if language == "C" and shape[-1] == processor.HEAD_WIDTH:
        assert found.is_contiguous() and nearly(found, expected, truth)
    else:
        assert torch.equal(found, expected), "the reference's"


@pytest.mark.parametrize("width", [4, 32])
def test_linear_attention_without_positive_keys_is_zero_and_nan_stays_nan(width, language):
    q, k, v = heads(1, 5, 1, width)
    assert torch.equal(processor.linear_attention(q, -torch.ones_like(q), v, 1e-8), torch.zeros_like(v))
    k[0, 2] = torch.nan
    assert processor.linear_attention(q, k, v, 1e-8).isnan().all()


@torch.no_grad()
def test_linear_attention_of_heads_that_are_not_together(language):
    given = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in heads(2, 9, 3, 32)]
    assert nearly(processor.linear_attention(*given, 1e-8), reference.linear_attention(*given, 1e-8), exact(*given))


def exact(*given):
    return EXACT["linear_attention"](*map(wide, given), 1e-8)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", PICTURES)
@torch.no_grad()
def test_gated_depthwise(shape, biased, in_place, language, threads, poisoned, monkeypatch):
    x, weight, bias, x_bias = picture(*shape)
    moved = x + x_bias.view(-1, 1, 1) if biased else x
    truth = reference.gated_depthwise(*map(wide, (moved.clone(), weight, bias)))
    expected = reference.gated_depthwise(moved.clone(), weight, bias)
    if in_place:
        monkeypatch.setattr(processor, "IN_PLACE", 0)
        monkeypatch.setattr(reference, "AT_ONCE", 0)
    found = processor.gated_depthwise(x, weight, bias, x_bias if biased else None)
    assert found.shape == expected.shape
    assert nearly(found, expected, truth)
    if language == "C":
        assert found.permute(0, 2, 3, 1).is_contiguous() or in_place
        assert (found.data_ptr() == x.data_ptr()) is in_place
    elif not in_place:
        assert torch.equal(found, expected), "the reference's"


@torch.no_grad()
def test_gated_depthwise_far_out(language):
    far = torch.tensor([-1e30, -200.0, -50.0, 0.0, 50.0, 200.0, 1e30, torch.inf, torch.nan])
    x = torch.cat([far.expand(16, 9), torch.full((16, 9), 200.0)]).t().view(9, 1, 1, 32).permute(0, 3, 1, 2)
    weight = torch.zeros(32, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    weight[16:] /= 200  # the gate is 1
    found = processor.gated_depthwise(x, weight, torch.zeros(32)) / torch.tensor(1.0).sigmoid()
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0, 200.0, 1e30, torch.inf, torch.nan])
    assert torch.allclose(found.flatten(1).t(), expected.expand(16, 9), rtol=1e-5, atol=1e-15, equal_nan=True)


@torch.no_grad()
def test_gated_depthwise_gates_far_out_and_what_is_not_a_number(language):
    x, weight, bias, _ = picture(1, 16, 1, 6)
    weight.zero_()
    bias[:16] = 2
    for gate, expected in ((-1e30, 0.0), (-200.0, 0.0), (200.0, 400.0), (torch.inf, torch.inf), (torch.nan, torch.nan)):
        bias[16:] = gate
        found = processor.gated_depthwise(x.clone(memory_format=torch.channels_last), weight, bias)
        assert torch.allclose(found, torch.full_like(found, expected), atol=1e-15, equal_nan=True)
    weight.fill_(1)
    x[0, 3, 0, 1] = torch.nan
    bias.zero_()
    found = processor.gated_depthwise(x, weight, bias)
    assert found[0, 3, 0].isnan().tolist() == 3 * [True] + 3 * [False] and found.isnan().sum() == 3


@pytest.mark.parametrize("hidden, layout", [(40, torch.channels_last), (48, torch.contiguous_format)])
@torch.no_grad()
def test_other_channels_and_layouts_are_left_to_the_reference(hidden, layout):
    x, weight, bias, _ = picture(2, hidden, 5, 3)
    x = x.contiguous(memory_format=layout)
    assert torch.equal(processor.gated_depthwise(x.clone(), weight, bias), reference.gated_depthwise(x, weight, bias))


class Derived(torch.Tensor):
    """Says where its memory is to nobody."""

    def data_ptr(self):
        raise AssertionError("a wrapper's memory was asked for")


@pytest.mark.parametrize("name", ["linear_attention", "modulate", "gated_depthwise"])
@torch.no_grad()
def test_classes_derived_from_tensor_are_left_to_the_reference(name):
    given = {
        "linear_attention": (*heads(1, 9, 2, 32), 1e-8),
        "modulate": (draw(1, 9, 16), *draw(2, 1, 1, 16)),
        "gated_depthwise": picture(1, 16, 2, 3)[:3],
    }[name]
    expected = getattr(reference, name)(*(one.clone() if torch.is_tensor(one) else one for one in given))
    derived = (one.as_subclass(Derived) if torch.is_tensor(one) else one for one in given)
    assert torch.equal(getattr(processor, name)(*derived).as_subclass(torch.Tensor), expected)


@torch.no_grad()
def test_one_shift_for_several_rows_is_left_to_the_reference():
    given = draw(3, 7, 16), draw(1, 1, 16, seed=1), draw(1, 1, 16, seed=2)
    assert torch.equal(processor.modulate(*given), reference.modulate(*given))


@pytest.mark.parametrize("name", ["linear_attention", "gated_depthwise"])
@torch.no_grad()
def test_the_count_of_threads_changes_nothing(name):
    if processor._library() is None:
        pytest.skip("this machine has no C compiler")
    given = (*heads(1, 100, 5, 32), 1e-8) if name == "linear_attention" else picture(2, 1040, 4, 7)[:3]
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(getattr(processor, name)(*given))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("mean", [0, 300])
@pytest.mark.parametrize("rows, tokens, channels", [(1, 63, 48), (3, 63, 40), (3, 7, 16), (2, 500, 1152)])
@torch.no_grad()
def test_modulate(rows, tokens, channels, mean, language, threads, poisoned):
    parts = draw(rows, 6 * channels, seed=1).unflatten(1, (6, -1)).chunk(6, dim=1)  # as a block has them
    given = mean + draw(rows, tokens, channels), parts[1], parts[3]
    expected, found = reference.modulate(*given), processor.modulate(*given)
    if language == "C" and channels % processor.LANES == 0:
        assert nearly(found, expected, reference.modulate(*map(wide, given)))
    else:
        assert torch.equal(found, expected), "the reference's"


def wide(tensor):
    return tensor.double()


def test_gated_residual_in_place():
    x, gate, branch = draw(2, 7, 16), draw(2, 1, 16, seed=1), draw(2, 7, 16, seed=2)
    expected = reference.gated_residual(x, gate, branch)
    assert gated_residual_(x, gate, branch) is branch and torch.equal(branch, expected)


def test_a_shift_for_every_token_is_left_to_the_reference():
    x = draw(1, 7, 16)
    assert torch.equal(processor.modulate(x, x, x), reference.modulate(x, x, x))


@pytest.mark.parametrize("name", ["linear_attention", "modulate", "gated_depthwise"])
@pytest.mark.parametrize("way", ["gradients", "bfloat16", "float16", "float64", "autocast"])
def test_other_ways_to_compute_are_the_references(name, way):
    def inputs():
        dtype = getattr(torch, way, torch.float32) if way.startswith(("bf", "fl")) else torch.float32
        if name == "linear_attention":
            parts = heads(1, 9, 2, 32, dtype)
        elif name == "modulate":
            parts = [draw(1, length, 16, seed=length, dtype=dtype) for length in (9, 1, 1)]
        else:
            parts = picture(1, 16, 2, 3, dtype)[:3]
        return [part.detach().requires_grad_() if way == "gradients" else part for part in parts]

    others = (1e-8,) if name == "linear_attention" else ()
    given, same = inputs(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found, expected = getattr(processor, name)(*given, *others), getattr(reference, name)(*same, *others)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert all(map(torch.equal, given, same)), "nothing is overwritten"
    if way == "gradients":
        losses = found.square().sum(), expected.square().sum()
        assert all(map(torch.equal, *map(torch.autograd.grad, losses, (given, same))))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_computes_and_learns_the_same(qk_norm):
    config = replace(tiny.TRANSFORMER, qk_norm=qk_norm)
    model, other = (tiny.filled(SanaTransformer(config, kernels=one)) for one in (REFERENCE, PROCESSOR))
    x, context = draw(1, config.in_channels, 5, 3), draw(1, 6, config.caption_channels, seed=1)
    timestep = torch.tensor([400.0])
    with torch.no_grad():
        expected, found = (one(x, timestep, context) for one in (model, other))
        truth = model.double()(x.double(), timestep.double(), context.double())
    assert distance(found, truth) <= 1.2 * distance(expected, truth)
    model.float()
    gradients = []
    for one in (model, other):
        loss = one(x, timestep, context).square().sum()
        gradients.append(torch.autograd.grad(loss, list(one.parameters())))
    assert all(map(torch.equal, *gradients))
