"""The router's product without a float32 copy of the tokens: one pass over them, and one back."""

import torch
from torch import Tensor

from kernels.cpu import torch_passes, unsupported_dtype
from kernels.cpu.passes import passes

FEW_TOKENS = 64
"""Below as many the copy of the weight that the pass makes costs more than one of the tokens."""


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    if weight.dtype != torch.float32:
        return f"takes a float32 weight only, not {weight.dtype}"
    return unsupported_dtype(x)


def gate(x: Tensor, weight: Tensor) -> Tensor:
    return (passes() if len(x) >= FEW_TOKENS else torch_passes).gate(x, weight)


def gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return passes().gate_backward(grad, x, weight)
