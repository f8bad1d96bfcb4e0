"""RMSNorm in one pass over its rows, with the residual sum before it."""

from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.passes import passes


def unsupported(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> str | None:
    return unsupported_dtype(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    out, total, _ = passes().rms_norm(x, weight, eps, residual)
    return out if residual is None else (out, total)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output (..., D) and the inverse root mean squares r, float32 (..., 1)."""
    out, _, r = passes().rms_norm(x, weight, eps, None)
    return out, r


def add_rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (..., D), the sum x + residual (..., D) that it is the norm of, and r, float32 (..., 1)."""
    return passes().rms_norm(x, weight, eps, residual)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and weight (D,). x is the sum where there was a residual, and `grad_sum` what reaches it
    by the way of the stream, which is added."""
    return passes().rms_norm_backward(grad, x, weight, r, grad_sum)
