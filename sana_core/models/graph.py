"""CUDA graphs of the Sana transformer: a call is recorded once and then replayed, as one launch instead of a thousand.

A replay runs the recorded kernels on the recorded memory. So it counts for inputs of the same shapes, which are copied
to where the recording found them, and for as long as each weight stays where it is. Values may change: weights are read
when a graph runs.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from .controlnet import Control
from .layers import AbsorbedKeysValues
from .sana import ContextCache, Perturbation

log = logging.getLogger(__name__)

LIMIT = 4  # graphs that a model keeps: guided and unguided steps, perturbed ones, another size
MOST_TOKENS = 16384  # of a batch. Larger ones, such as 4096 px, keep a GPU busy longer than their launches take


class Recorder(Protocol):
    """What makes graphs: on a GPU CUDA, in tests something that records and replays in plain Python."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`, after which it does no more than it will do when it is recorded."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats `run` in the same memory, and the tensor that its result is in after each repetition."""


class CudaRecorder:
    """CUDA graphs of one device, which share their memory since none runs beside another."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Libraries set up their workspaces, one for each stream, and Triton compiles: no recording may."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            result = run()
        caller.wait_stream(self._stream)
        return result.clone()  # its own memory belongs to the other stream

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What other threads do on the GPU meanwhile does not count."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


def cuda_recorder(device: torch.device) -> Recorder | None:
    """The recorder of a device; None for all but NVIDIA's GPUs."""
    return CudaRecorder(device) if device.type == "cuda" and torch.version.cuda is not None else None


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call: what each step has of its own, and what all steps of a prompt share."""

    x: Tensor
    timestep: Tensor
    guidance: Tensor | None
    context: ContextCache

    def steps_own(self) -> list[Tensor]:
        return [self.x, self.timestep] + ([] if self.guidance is None else [self.guidance])

    def kind(self) -> Hashable:
        """What a recording depends on: equal for calls that may share one."""
        keys_values = self.context.keys_values[0]  # those of all blocks are alike
        return tuple(
            None if one is None else (one.shape, one.stride(), one.dtype, one.device)
            for one in (self.x, self.timestep, self.guidance, self.context.features, *keys_values, self.context.mask)
        )

    def with_own_memory(self) -> "_Inputs":
        """Inputs of the same kind, with any values."""
        guidance = None if self.guidance is None else _buffer(self.guidance)
        context = replace(self.context, branches={}).each(_buffer)  # calls with a ControlNet are not recorded
        return _Inputs(_buffer(self.x), _buffer(self.timestep), guidance, context)


def _buffer(tensor: Tensor) -> Tensor:
    """Memory laid out like a tensor's, since kernels may round otherwise in another layout."""
    if 0 in tensor.stride():  # repeated values, which memory of its own cannot repeat
        return torch.empty_like(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Recording:
    """A recorded call with the memory of its inputs and of its result."""

    def __init__(self, recorder: Recorder, run: Callable[[_Inputs], Tensor], inputs: _Inputs):
        self._inputs = inputs.with_own_memory()
        self._prompt: Callable[[], ContextCache | None] = lambda: None  # whose values the memory holds
        self._replay, self._result = recorder.record(partial(run, self._inputs))

    def __call__(self, inputs: _Inputs) -> Tensor:
        self._fill(inputs)
        self._replay()
        return self._result.clone()

    def _fill(self, inputs: _Inputs) -> None:
        for own, given in zip(self._inputs.steps_own(), inputs.steps_own(), strict=True):
            own.copy_(given)
        if self._prompt() is not inputs.context:
            for own, given in zip(_tensors(self._inputs.context), _tensors(inputs.context), strict=True):
                own.copy_(given)
            self._prompt = ref(inputs.context)


def _tensors(context: ContextCache) -> list[Tensor]:
    mask = [] if context.mask is None else [context.mask]
    return [context.features, *(tensor for one in context.keys_values for tensor in one), *mask]


class GraphedCalls:
    """A transformer that is called like itself, and repeats calls from graphs where that gives the same bits.

    The first call of a kind runs as always, the second is recorded. Calls that cannot be recorded run as always too:
    without a GPU, with gradients or autocast, under torch.compile, with hooks or a ControlNet, with weights elsewhere,
    with a caption that is not prepared. If a recording fails, all do from then on.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[..., Tensor] | None = None,
        recorder: Callable[[torch.device], Recorder | None] = cuda_recorder,
    ):
        """`call`: what to record, something that calls the network; None is the network itself."""
        self._network = network
        self._call = network if call is None else call
        self._recorder_of = recorder
        self._failed = False
        self._without: set[torch.device] = set()  # devices without graphs: no step there is to walk over the weights
        self.drop()

    def __deepcopy__(self, memo) -> "GraphedCalls":
        """Of the copied network, without the graphs: they point into the memory of this one."""
        return GraphedCalls(copy.deepcopy(self._network, memo), copy.deepcopy(self._call, memo), self._recorder_of)

    def drop(self) -> None:
        """Forget all graphs and free their memory."""
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._recorder: Recorder | None = None
        self._weights: tuple[int, ...] | None = None

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | ContextCache,
        mask: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        perturbation: Perturbation | None = None,
        control: Sequence[Control] = (),
    ) -> Tensor:
        """`SanaTransformer.forward`, with its arguments, result and errors."""
        options = {"mask": mask, "guidance": guidance, "perturbation": perturbation, "control": control}
        if not _is_fixed(x, context, control) or self._failed or not self._follow_weights(x.device):
            return self._call(x, timestep, context, **options)
        try:
            return self._recorded(_Inputs(x, timestep, guidance, context), perturbation)
        except RuntimeError as error:
            log.warning("A CUDA graph of the transformer failed; it runs without. %s: %s", type(error).__name__, error)
            self._failed = True
            self.drop()
        return self._call(x, timestep, context, **options)

    def _recorded(self, inputs: _Inputs, perturbation: Perturbation | None) -> Tensor:
        def run(given: _Inputs) -> Tensor:
            options = {"guidance": given.guidance, "perturbation": perturbation}
            return self._call(given.x, given.timestep, given.context, **options)

        # Inference tensors cannot be filled outside of inference mode.
        kind = (inputs.kind(), perturbation, torch.is_inference_mode_enabled())
        if kind in self._recordings:
            recording = self._recordings[kind] or _Recording(self._recorder, run, inputs)
            result = recording(inputs)
        else:
            recording, result = None, self._recorder.warm_up(partial(run, inputs))
        self._recordings[kind] = recording
        self._recordings.move_to_end(kind)
        if len(self._recordings) > LIMIT:
            self._recordings.popitem(last=False)
        return result

    def _follow_weights(self, device: torch.device) -> bool:
        """Whether calls can be recorded on the device; drops what was recorded with weights that have moved."""
        weights = None if device in self._without else _addresses(self._network, device)
        if weights is None or weights != self._weights:
            self.drop()
        if weights is not None and self._recorder is None:
            self._weights, self._recorder = weights, self._recorder_of(device)
            if self._recorder is None:
                self._without.add(device)
        return self._recorder is not None


def _is_fixed(x: Tensor, context: Tensor | ContextCache, control: Sequence[Control]) -> bool:
    """Whether a call does the same whatever the values of its inputs are, and is small enough to gain from a graph."""
    return (
        isinstance(context, ContextCache)
        and not any(isinstance(one, AbsorbedKeysValues) for one in context.keys_values)  # cut by their lengths
        and not any(one.strength for one in control)
        and len(x) * x.shape[-2] * x.shape[-1] <= MOST_TOKENS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _addresses(network: nn.Module, device: torch.device) -> tuple[int, ...] | None:
    """Where modules, their own ways to run and weights are; None if a weight is elsewhere or a hook may interfere."""
    found, modules = [], [network]
    while modules:  # each step takes this walk: parameters() and modules() would take several times as long
        module = modules.pop()
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        found += [id(module), id(module.__dict__.get("forward"))]
        modules += filter(None, module._modules.values())
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.device != device:
                    return None
                found.append(parameter.data_ptr())
    return tuple(found)
