"""SwiGLU of a dense MLP: one pass, and one back."""

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.passes import passes


def unsupported(hidden: Tensor) -> str | None:
    return unsupported_dtype(hidden)


def swiglu(hidden: Tensor) -> Tensor:
    return passes().swiglu(hidden.contiguous())


def swiglu_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of hidden (..., 2F)."""
    return passes().swiglu_backward(grad.clone(memory_format=torch.contiguous_format), hidden.contiguous())[0]
