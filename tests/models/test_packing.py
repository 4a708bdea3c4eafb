"""Packed weights give what the layers give, for as long as nothing else has a say in them."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sana_core.models import packing
from sana_core.models.packing import MOST_TOKENS, PLAIN_CALLS, PackedCalls, PackedLinear
from sana_core.models.sana import Perturbation
from sana_core.training.lora import add_adapters
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="weights are packed by MKL")
SIDE = 4


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Whatever the size, models count as large."""
    monkeypatch.setattr(packing, "LEAST_WEIGHTS", 0)


@pytest.fixture
def calls():
    return PackedCalls(tiny.transformer())


def latent(batch=1, side=SIDE, dtype=torch.float32):
    return torch.randn(batch, 32, side, side + 1, generator=torch.Generator().manual_seed(3)).to(dtype)


@torch.no_grad()
def predict(calls, x, **options):
    """The velocity, from a call with a raw caption."""
    context = torch.randn(len(x), 7, tiny.CHANNELS, generator=torch.Generator().manual_seed(4)).to(x.dtype)
    return calls(x, torch.full((len(x),), 400.0), context, **options)


def pack(calls, x=None):
    """Calls until weights are packed; the result of the first call that computes with them."""
    for _ in range(PLAIN_CALLS):
        predict(calls, latent() if x is None else x)
        assert calls.weights is None
    result = predict(calls, latent() if x is None else x)
    assert calls.weights is not None
    return result


@pytest.mark.parametrize("batch, perturbation", [(1, None), (3, None), (2, Perturbation((1,), 1))])
def test_packed_weights_are_as_near_to_float64(batch, perturbation):
    network = tiny.transformer()
    calls, x = PackedCalls(network), latent(batch)
    pack(calls, x)
    packed, plain = (predict(one, x, perturbation=perturbation) for one in (calls, network))
    truth = predict(copy.deepcopy(network).double(), x.double(), perturbation=perturbation)
    assert len(packed) == batch + (perturbation is not None)
    assert (packed - truth).norm() < 1.2 * (plain - truth).norm() < 1e-5 * truth.norm()


def test_the_layers_are_those_with_packed_weights(calls, monkeypatch):
    counted, forward = [], PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: counted.append(layer) or forward(layer, x))
    pack(calls)
    network = calls._network
    assert len(counted) == 4 * len(network.blocks), "qkv, proj, inverted_conv and point_conv"
    assert not any(isinstance(module, PackedLinear) for module in network.modules()), "they are back in place"


def test_other_tokens_than_those_packed_for_are_computed_too():
    weight, bias, x = torch.randn(6, 5), torch.randn(6), torch.randn(2, 7, 5)
    assert torch.equal(PackedLinear(weight, None, 3)(x), F.linear(x, weight))
    assert torch.equal(PackedLinear(weight, bias, 3)(x), F.linear(x, weight, bias))


def test_the_layers_come_back_after_an_error(calls):
    pack(calls)
    before, kernels = list(calls._network.modules()), calls._network.blocks[0].kernels
    with pytest.raises(ValueError, match="guidance"):
        predict(calls, latent(), guidance=torch.ones(1))
    assert list(calls._network.modules()) == before and calls._network.blocks[0].kernels is kernels


def replaced(network):
    network.blocks[1].mlp.point_conv.conv.weight = torch.nn.Parameter(torch.zeros(64, 160, 1, 1))


def changed_in_place(network):
    network.blocks[0].attn.qkv.weight.zero_()


def other_bias(network):
    network.blocks[0].attn.proj.bias.data = torch.ones(64)


@pytest.mark.parametrize("change", [replaced, changed_in_place, other_bias])
@torch.no_grad()
def test_changed_weights_are_packed_anew(calls, change):
    before = pack(calls)
    change(calls._network)
    after = predict(calls, latent())
    assert calls.weights is None, "they may change again"
    assert torch.equal(after, predict(calls._network, latent())) and not torch.equal(after, before)
    for _ in range(PLAIN_CALLS):
        again = predict(calls, latent())
    assert calls.weights is not None
    assert (again - after).abs().max() < 1e-5 * after.abs().max()


def test_other_sizes_are_packed_anew_and_memory_is_freed(calls):
    pack(calls)
    freed = weakref.ref(calls.weights)
    predict(calls, latent(side=SIDE + 1))
    gc.collect()
    assert freed() is None and calls.weights is None


def test_a_copy_packs_its_own(calls):
    pack(calls)
    network, copied = copy.deepcopy([calls._network, calls])
    assert copied._network is copied._call is network and copied.weights is None
    pack(copied)
    assert copied.weights is not calls.weights


def hook(network):
    network.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)


def hook_of_the_feed_forward(network):
    network.blocks[1].mlp.register_forward_hook(lambda *_: None)


def hook_of_the_attention(network):
    network.blocks[1].attn.register_forward_hook(lambda *_: None)


def own_forward(network):
    layer = network.blocks[0].mlp.inverted_conv
    layer.forward = layer.forward


def other_depthwise(network):
    conv = network.blocks[1].mlp.depth_conv.conv
    conv._conv_forward = lambda x, weight, bias: x[:, : len(weight) // 2]


def other_class(network):
    network.blocks[0].attn.proj = torch.nn.Sequential(network.blocks[0].attn.proj)


def adapters(network):
    add_adapters(network, rank=2)


@pytest.mark.parametrize(
    "say", [hook, hook_of_the_attention, hook_of_the_feed_forward, own_forward, other_depthwise, other_class, adapters]
)
def test_layers_that_compute_otherwise_are_called(calls, say):
    say(calls._network)
    for _ in range(PLAIN_CALLS + 1):
        assert torch.equal(predict(calls, latent()), predict(calls._network, latent()))
    assert calls.weights is None


def test_large_pictures_half_precision_gradients_and_short_memory_do_without(calls, monkeypatch):
    side = int(MOST_TOKENS**0.5)
    for x in (latent(side=side), latent().bfloat16()):
        network = PackedCalls(copy.deepcopy(calls._network).to(x.dtype))
        for _ in range(PLAIN_CALLS + 1):
            predict(network, x)
        assert network.weights is None
    pack(calls)
    x = latent().requires_grad_()
    calls(x, torch.full((1,), 400.0), torch.ones(1, 7, tiny.CHANNELS)).sum().backward()
    assert x.grad.abs().sum() > 0
    calls.drop()
    monkeypatch.setattr(packing.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for _ in range(PLAIN_CALLS + 1):
        predict(calls, latent())
    assert calls.weights is None


def test_small_models_do_without(monkeypatch):
    monkeypatch.undo()
    calls = PackedCalls(tiny.transformer())
    for _ in range(PLAIN_CALLS + 1):
        predict(calls, latent())
    assert calls.weights is None
