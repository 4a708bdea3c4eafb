"""A CUDA graph of the transformer gives the bits that its kernels give without, PyTorch's and the fused ones."""

import logging

import pytest
import torch

from sana_core import SanaPipeline
from sana_core.kernels import REFERENCE, best_kernels
from sana_core.models.graph import GraphedCalls
from sana_core.models.sana import Perturbation, SanaTransformer
from tests import tiny

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("error"),
]
CUDA = torch.device("cuda", 0)


def network_of(kernels, dtype, **changes):
    config = tiny.transformer(**changes).config
    return tiny.filled(SanaTransformer(config, kernels=kernels)).to(CUDA, dtype)


def inputs_of(network, seed, batch=2, side=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 32, side, side + 1, generator=generator).to(CUDA, network.dtype)
    timestep = (1000 * torch.rand(1, generator=generator)).to(CUDA).expand(batch)
    context = torch.randn(batch, 40, tiny.CHANNELS, generator=generator).to(CUDA, network.dtype)
    mask = torch.arange(40, device=CUDA) < torch.tensor([7, 33], device=CUDA)[:batch, None]
    return x, timestep, network.prepare_context(context, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True}, {"pos_embed_base": 16.0, "pos_embed_interpolation": 0.5}], ids=str
)
@torch.no_grad()
def test_replays_are_bit_equal(fused, dtype, changes, caplog):
    network = network_of(best_kernels(CUDA) if fused else REFERENCE, dtype, **changes)
    graphs = GraphedCalls(network)
    with caplog.at_level(logging.WARNING):
        for perturbation in (None, Perturbation((1,), 1)):
            for seed in (0, 1, 1, 2):
                inputs = inputs_of(network, seed)
                expected = network(*inputs, perturbation=perturbation)
                assert torch.equal(graphs(*inputs, perturbation=perturbation), expected)
    assert not caplog.text, "a recording failed"
    assert all(recording is not None for recording in graphs._recordings.values()), "recorded and replayed"


@torch.no_grad()
def test_weights_that_move_are_met_where_they_are():
    network = network_of(best_kernels(CUDA), torch.bfloat16)
    graphs, inputs = GraphedCalls(network), inputs_of(network, 0)
    for _ in range(3):
        graphs(*inputs)
    network.to("cpu").to(CUDA)
    with torch.no_grad():
        network.blocks[0].attn.proj.weight.mul_(0.5)
    for _ in range(3):
        assert torch.equal(graphs(*inputs), network(*inputs))


@torch.no_grad()
def test_what_synchronises_is_left_to_the_host(caplog):
    """As a kernel from elsewhere may; the GPU works on afterwards."""
    network = network_of(REFERENCE, torch.float32)

    def call(x, timestep, context, **options):
        return network(x, timestep, context, **options) * x.sum().isfinite().item()

    graphs, inputs = GraphedCalls(network, call), inputs_of(network, 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert torch.equal(graphs(*inputs), network(*inputs))
    assert caplog.text.count("CUDA graph of the transformer failed") == 1


@pytest.mark.parametrize("settings", [{}, {"pag_guidance_scale": 2.0}, {"guidance_interval": (0.3, 0.9)}])
def test_whole_samplings_are_bit_equal(settings):
    parts = network_of(best_kernels(CUDA), torch.bfloat16), tiny.dc_ae().to(CUDA), tiny.text_encoder()
    eager, graphed = (SanaPipeline(*parts, cuda_graph=choice) for choice in (False, True))
    settings = {"seed": 3, "num_inference_steps": 6, "output_type": "latent", **settings}
    for prompt in ("a red cat", ["two green birds", "a red cat"], "a red cat"):
        assert torch.equal(graphed(prompt, "blue", **settings), eager(prompt, "blue", **settings))


def test_no_step_waits_for_the_gpu():
    """PyTorch raises where a copy or a read makes the host wait; what comes before the first step may."""
    network = network_of(best_kernels(CUDA), torch.bfloat16)
    pipe = SanaPipeline(network, tiny.dc_ae().to(CUDA), tiny.text_encoder())
    settings = {"seed": 3, "num_inference_steps": 6, "output_type": "latent", "pag_guidance_scale": 2.0}
    for _ in range(2):
        pipe("a red cat", **settings)

    def watch(step):
        torch.cuda.set_sync_debug_mode("error" if step["i"] < 5 else "default")

    try:
        pipe("a red cat", callback=watch, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
