"""Rotary embedding in one pass."""

from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.passes import passes


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return unsupported_dtype(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return passes().rope(x, cos, sin)
