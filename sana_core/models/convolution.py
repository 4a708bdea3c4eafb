"""What DC-AE's blocks are made of: convolutions with a norm and an activation.

The maps [B, C, h, w] are in channels-last layout throughout, where norms read whole positions and depthwise
convolutions run along the channels. Where no gradient is needed, what a convolution made is overwritten by what
follows: a new map of a large picture costs more time than the arithmetic on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import REFERENCE


class RMSNorm2d(nn.Module):
    """Root-mean-square norm over the channels of [B, C, h, w], with weight and bias."""

    def __init__(self, channels: int, eps: float = 1e-5, **factory):
        super().__init__()
        self.eps = eps
        self.kernels = REFERENCE
        self.weight = nn.Parameter(torch.ones(channels, **factory))
        self.bias = nn.Parameter(torch.zeros(channels, **factory))

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """The norm of x, plus the residual.

        overwrite: whether x may be used for the result, if no gradient is needed.
        """
        x = x.movedim(1, -1)
        tracked = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not (tracked or x.is_cuda):
            return plus(self._step_by_step(x, overwrite).movedim(-1, 1), residual)
        residual = None if residual is None else residual.movedim(1, -1)
        return self.kernels.rms_norm(x, self.weight, self.bias, residual, self.eps).movedim(-1, 1)

    def _step_by_step(self, x: Tensor, overwrite: bool) -> Tensor:
        """The norm of x [B, h, w, C], for which PyTorch makes a map of each operation's result outside CUDA."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(self.eps).rsqrt_()
        wide = torch.mul(wide, scale, out=wide if overwrite or wide is not x else None)
        return wide.mul_(self.weight).add_(self.bias).to(x.dtype)


class SiLU(nn.Module):
    """SiLU of what a convolution or a norm just made, in place where no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


class ConvLayer(nn.Module):
    """Convolution that keeps the size (or halves it with stride 2), then the norm and activation that are given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        act: nn.Module | None = None,
        **factory,
    ):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias, **factory)
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.normalize(x)
        return x if self.act is None else self.act(x)

    def normalize(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of the convolution's result, which is overwritten where it can be, plus the residual."""
        if isinstance(self.norm, RMSNorm2d):
            return self.norm(x, residual, overwrite=True)
        return plus(self.norm(x), residual)


def plus(fresh: Tensor, other: Tensor | None) -> Tensor:
    """The sum, in place of the first if no gradient is needed: it must be a map that nobody else holds."""
    if other is None:
        return fresh
    return fresh + other if fresh.requires_grad else fresh.add_(other)
