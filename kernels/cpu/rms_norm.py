"""RMSNorm in few passes over x: every pass of torch's CPU kernels over (N, D) costs about as much as the next."""

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype


def unsupported(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> str | None:
    return unsupported_dtype(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm_forward(x, weight, eps)[0]
    return add_rms_norm_forward(x, weight, eps, residual)[:2]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output (..., D) and the inverse root mean squares r, float32 (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r.to(x.dtype)).mul_(weight.to(x.dtype)), r


def add_rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (..., D), the sum x + residual (..., D) that it is the norm of, and r, float32 (..., 1)."""
    total = x + residual
    out, r = rms_norm_forward(total, weight, eps)
    return out, total, r


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and weight (D,). x is the sum where there was a residual, and `grad_sum` what reaches it
    by the way of the stream, which is added.

    With y = x r w: dw = sum over rows of g x r, and dx = r g w - x r^3 / D sum over channels of g x w. Both sums are
    matrix-vector products with the one product g x.
    """
    D = x.shape[-1]
    w, rows = weight.to(x.dtype), r.view(-1)
    product = (grad * x).view(-1, D)
    grad_weight = torch.mv(product.t(), rows.to(x.dtype))
    shift = torch.mv(product, w).float().mul_(rows.pow(3)).div_(-D)
    grad_x = (grad * w).mul_(r.to(x.dtype)).addcmul_(x, shift.to(x.dtype).view(r.shape))
    if grad_sum is not None:
        grad_x.add_(grad_sum)
    return grad_x, grad_weight.to(weight.dtype)
