"""No step of a sampling waits for the GPU: nothing that it computes is read by the host.

Fake tensors that claim to be on a GPU have no values, so whatever reads one fails.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sana_core.captions import Captions
from sana_core.finite import FiniteSteps
from sana_core.models.sana import SanaTransformer
from sana_core.sampler import scm
from sana_core.sampler.schedule import get_sigmas_flow
from sana_core.sampling import FlowSampling, SprintSampling
from tests import tiny


class NoCopies(TorchDispatchMode):
    """Counts copies from one device to another that wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            target = kwargs.get("device")
            self.count += target is not None and torch.device(target).type != args[0].device.type
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def whole_captions(monkeypatch):
    """Their lengths are read once, before the first step."""
    monkeypatch.setattr("sana_core.models.sana.drop_padding", lambda context, mask: (context, None))


def network_of(config):
    return SanaTransformer(config, device="cuda").requires_grad_(False)


def captions():
    return Captions(torch.randn(1, 6, tiny.CHANNELS, device="cuda"), torch.ones(1, 6, device="cuda"))


@pytest.mark.parametrize(
    "sampler, settings",
    [
        ("flow_dpm-solver", {}),
        ("flow_euler", {}),
        ("flow_dpm-solver", {"pag_scale": 2.0}),
        ("flow_dpm-solver", {"interval": (0.3, 0.9)}),
    ],
)
def test_flow_samplers(sampler, settings):
    sigmas = get_sigmas_flow(4, 3.0)
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies() as copies:
        network = network_of(tiny.TRANSFORMER)
        guidance = {"scale": 4.5, "pag_scale": 1.0, "interval": None, "perturbed_layers": (1,), **settings}
        sampling = FlowSampling(network, network, sampler, sigmas, **guidance)
        model, counts = sampling.denoiser(captions(), captions()), []
        with pytest.raises(DataDependentOutputException):  # at the end, when the steps are asked whether all is finite
            sampling.sample(model, torch.randn(1, 32, 3, 3, device="cuda"), lambda step: counts.append(copies.count))
    assert len(counts) == 4 and len(set(counts)) == 1, "copies between devices after the first step began"
    assert len(sampling.steps._counts) == 0, "the check was what failed"


def test_scm():
    config, sigmas = replace(tiny.TRANSFORMER, guidance_embed=True, qk_norm=True), scm.get_sigmas_scm(3)
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies() as copies:
        network = network_of(config)
        sampling = SprintSampling(network, network, sigmas, 4.5, torch.Generator())
        model, counts = sampling.denoiser(captions()), []
        with pytest.raises(DataDependentOutputException):
            sampling.sample(model, torch.randn(1, 32, 3, 3, device="cuda"), lambda step: counts.append(copies.count))
    assert len(counts) == 3 and len(set(counts)) == 1
    assert len(sampling.steps._counts) == 0


def test_a_step_that_reads_is_seen():
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies() as copies:
        x = torch.ones(3, device="cuda")
        x.cpu()
        assert copies.count == 1
        with pytest.raises(DataDependentOutputException):
            bool(x[0] > 0)


class OnGpu(torch.Tensor):
    """A tensor with values that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_the_first_bad_step_is_named_after_the_last():
    steps = FiniteSteps("the transformer")
    for values in ([0.0, 1.0], [torch.nan, torch.inf], [torch.nan, 1.0]):
        tensor = torch.tensor(values).as_subclass(OnGpu)
        assert steps.watch(tensor) is tensor
    with pytest.raises(FloatingPointError, match="the transformer at step 2 returned NaN or infinity in 2 of 2 values"):
        steps.check()
    steps.check()  # what was told is not told again


def test_a_cpu_fails_at_once():
    steps = FiniteSteps("the transformer")
    steps.watch(torch.ones(2))
    with pytest.raises(FloatingPointError, match="at step 2 returned NaN"):
        steps.watch(torch.tensor([torch.nan]))
