"""Packed weights: a processor's matrix products, sooner.

A product copies its operands into the order that the processor reads them in, weights in each step anew. MKL takes
weights that were packed so before (`cblas_sgemm_pack` of Intel's reference), for one count of rows. That is much of a
product with few rows: the 0.6B model takes 16 % less time with 256 tokens and 5 % less with 1024 (two cores with
AVX-512). The copies take as much memory as the weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Kernels, reference
from ..kernels.processor import gated_depthwise, gated_residual_
from .layers import ConvLayer, GLUMBConv, SanaBlock, is_untouched, pointwise
from .sana import SanaTransformer

PLAIN_CALLS = 4  # with pictures of one size, in front of those with packed weights: packing takes what some calls gain
LEAST_WEIGHTS = 100_000_000  # of a model. In a smaller one it is not the products that take the time
MOST_TOKENS = 1024  # of a picture. With more, the copies are too small a part of a product
SPARE = 3  # times the weights must be available: MKL reserves up to twice as much as it fills


class PackedLinear(nn.Module):
    """A linear layer without gradients, of `tokens` rows at a time: x [B, tokens, I] to [B, tokens, O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int):
        """weight [O, I] and bias [O], float32."""
        super().__init__()
        self.tokens = tokens
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), tokens)
        # Not parameters: the layer that they belong to keeps them. MKL's call asks for the weight without need.
        self.operands = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Another count of tokens is computed without packed weights."""
        if x.shape[1] != self.tokens:
            return F.linear(x, *self.operands)
        return _by_row(lambda row: torch.ops.mkl._mkl_linear(row, self.packed, *self.operands, self.tokens), x)


class PackedGLUMBConv(nn.Module):
    """The gated feed-forward, row by row."""

    def __init__(self, mlp: GLUMBConv, tokens: int):
        super().__init__()
        inverted, depth, point = (layer.conv for layer in _convolutions(mlp))
        self.inverted = PackedLinear(inverted.weight.flatten(1), None, tokens)
        self.mix = partial(gated_depthwise, weight=depth.weight, bias=depth.bias, x_bias=inverted.bias)
        self.point = PackedLinear(point.weight.flatten(1), None, tokens)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """As `GLUMBConv`."""
        return _by_row(lambda row: self._mix(row, height, width), x)

    def _mix(self, x: Tensor, height: int, width: int) -> Tensor:
        picture = self.inverted(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return self.point(self.mix(picture).permute(0, 2, 3, 1).flatten(1, 2))


def _by_row(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return compute(x) if len(x) == 1 else torch.cat([compute(row) for row in x.split(1)])


class PackedWeights:
    """A transformer's large layers with packed weights, for pictures of `tokens` latent positions."""

    def __init__(self, network: SanaTransformer, tokens: int):
        self._packed_from = tokens, _state(network)
        self._parts: list[tuple[nn.Module, str, nn.Module | Kernels]] = []
        for block in network.blocks:
            for name in ("qkv", "proj"):
                layer = getattr(block.attn, name)
                self._parts.append((block.attn, name, PackedLinear(layer.weight, layer.bias, tokens)))
            self._parts.append((block, "mlp", PackedGLUMBConv(block.mlp, tokens)))
            # Nobody else sees what attention and feed-forward return.
            self._parts.append((block, "kernels", replace(block.kernels, gated_residual=gated_residual_)))

    def fit(self, network: SanaTransformer, tokens: int) -> bool:
        """Whether the network's weights are still those that were packed, and for so many tokens."""
        return self._packed_from == (tokens, _state(network))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network computes with them."""
        own = [(parent, name, getattr(parent, name)) for parent, name, _ in self._parts]
        try:
            for part in self._parts:
                setattr(*part)
            yield
        finally:
            for part in own:
                setattr(*part)


class PackedCalls:
    """A transformer that is called like itself, and computes with packed weights where that is sooner.

    That is for a large model on a processor with MKL, in float32 without gradients, from the fifth call for pictures of
    one size on. With hooks or adapters on the layers, or too little memory, calls run as always. Results differ by
    rounding. Packed weights are kept until weights change or pictures of another size are wanted.
    """

    def __init__(self, network: SanaTransformer, call: Callable[..., Tensor] | None = None):
        """`call`: a method of the network; None is the network itself."""
        self._network = network
        self._call = network if call is None else call
        self._is_large = sum(weight.numel() for weight in network.parameters()) >= LEAST_WEIGHTS
        self.drop()

    def __deepcopy__(self, memo) -> "PackedCalls":
        """Of the copied network."""
        return PackedCalls(copy.deepcopy(self._network, memo), copy.deepcopy(self._call, memo))

    def drop(self) -> None:
        """Forget the packed weights and free their memory."""
        self.weights: PackedWeights | None = None
        self._tokens = self._calls = 0

    def __call__(self, x: Tensor, *args, **options) -> Tensor:
        """`SanaTransformer.forward`, with its arguments, result and errors."""
        packed = self._packed_for(x.shape[-2] * x.shape[-1]) if self._is_large and _computes_packed(x) else None
        with nullcontext() if packed is None else packed.in_place():
            return self._call(x, *args, **options)

    def _packed_for(self, tokens: int) -> PackedWeights | None:
        if not all(map(_is_plain, self._network.blocks)):
            return None
        if self.weights is not None and self.weights.fit(self._network, tokens):
            return self.weights
        if self.weights is not None or tokens != self._tokens:
            self.drop()
        self._tokens = tokens
        self._calls += 1
        if self._calls > PLAIN_CALLS and psutil.virtual_memory().available >= SPARE * _size(self._network):
            self.weights = PackedWeights(self._network, tokens)
        return self.weights


def _computes_packed(x: Tensor) -> bool:
    """Whether calls with such a latent gain from packed weights."""
    return (
        (x.device.type, x.dtype) == ("cpu", torch.float32)
        and x.shape[-2] * x.shape[-1] <= MOST_TOKENS
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkl, "_mkl_linear")
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _layers(block: SanaBlock) -> list[nn.Module]:
    """The layers whose weights are packed, and the convolution that is between two of them."""
    return [block.attn.qkv, block.attn.proj, *(layer.conv for layer in _convolutions(block.mlp))]


def _convolutions(mlp: GLUMBConv) -> list[ConvLayer]:
    return [mlp.inverted_conv, mlp.depth_conv, mlp.point_conv]


def _is_plain(block: SanaBlock) -> bool:
    """Whether the layers compute what those with packed weights do."""
    mlp = block.mlp
    if type(mlp) is not GLUMBConv or not all(map(is_untouched, (block.attn, mlp, *_convolutions(mlp)))):
        return False
    computed = [layer.conv._conv_forward for layer in _convolutions(mlp)]
    known = [[pointwise, mix, pointwise] for mix in (reference.gated_depthwise, gated_depthwise)]
    return computed in known and all(map(_has_plain_weights, _layers(block)))


def _has_plain_weights(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or not is_untouched(layer):
        return False
    weight = layer.weight
    return type(weight) is nn.Parameter and (weight.device.type, weight.dtype) == ("cpu", torch.float32)


def _parameters(network: SanaTransformer) -> Iterator[Tensor]:
    for block in network.blocks:
        for layer in _layers(block):
            yield from (parameter for parameter in layer._parameters.values() if parameter is not None)


def _size(network: SanaTransformer) -> int:
    """Bytes that packed weights take."""
    return sum(weight.nbytes for weight in _parameters(network))


def _state(network: SanaTransformer) -> list[tuple[int, int | None]]:
    """Where weights are, and how often they were changed there, as far as PyTorch counts it."""
    return [(one.data_ptr(), None if one.is_inference() else one._version) for one in _parameters(network)]
