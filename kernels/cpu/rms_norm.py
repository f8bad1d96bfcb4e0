"""RMSNorm in three passes over x: the norm of each row in float32, then two products."""

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype


def unsupported(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return unsupported_dtype(x)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), float32 (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * inverse_rms(x, eps).to(x.dtype)).mul_(weight.to(x.dtype))


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight: with y = x r, dx = r (g w - y mean(g w y)) and dw = sum of g y over rows."""
    r = inverse_rms(x, eps).to(x.dtype)
    y = x * r
    gy = grad * y
    D = x.shape[-1]
    # A product with a vector of ones is the fastest exact-in-float32 row sum that oneDNN has for bfloat16.
    grad_weight = torch.mv(gy.view(-1, D).t(), gy.new_ones(gy.numel() // D))
    mean = torch.mv(gy.view(-1, D), weight.to(x.dtype)).div_(D).view(*x.shape[:-1], 1)
    grad_x = (grad * weight.to(x.dtype)).addcmul_(y, mean, value=-1).mul_(r)
    return grad_x, grad_weight.to(weight.dtype)
