"""Where and how the kernels of this folder run."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, slowly, for tests
_INTERPRETED = tl.constexpr(INTERPRETED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_here(*tensors: Tensor) -> bool:
    """Whether the kernels can compute with these tensors; else the reference has to.

    torch.compile gets the reference, which it fuses with what is around it.
    """
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    reachable = first.is_cuda or (INTERPRETED and first.device.type == "cpu")
    return (
        reachable
        and first.numel() > 0
        and all(tensor.device == first.device and tensor.dtype in DTYPES for tensor in tensors)
    )


def alike(*tensors: Tensor) -> bool:
    """Whether the tensors share a dtype that autocast will not change: then the result has it too."""
    dtypes = {tensor.dtype for tensor in tensors}
    return len(dtypes) == 1 and not torch.is_autocast_enabled(tensors[0].device.type)


def tracked(*tensors: Tensor) -> bool:
    """Whether autograd follows a function of these tensors; where it does not, the kernel is launched straight away."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where neighbours in its last dimension are apart: the kernels read whole rows."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dot_precision(*tensors: Tensor) -> str:
    """How a dot of float32 operands that come from these tensors multiplies.

    Three TF32 products are within float32 rounding of what 16-bit tensors hold, and run on tensor cores.
    """
    return "ieee" if any(tensor.dtype == torch.float32 for tensor in tensors) else "tf32x3"


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in another dtype, rounded to nearest even; the interpreter cuts bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(dtype)
