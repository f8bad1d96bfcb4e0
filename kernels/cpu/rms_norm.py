"""RMSNorm in few passes over x: every pass of torch's CPU kernels over (N, D) costs about as much as the next."""

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype


def unsupported(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return unsupported_dtype(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_forward(x, weight, eps)[0]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output (..., D) and the inverse root mean squares r, float32 (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r.to(x.dtype)).mul_(weight.to(x.dtype)), r


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and weight (D,).

    With y = x r w: dw = sum over rows of g x r, and dx = r g w - x r^3 / D sum over channels of g x w. Both sums are
    matrix-vector products with the one product g x.
    """
    D = x.shape[-1]
    w, rows = weight.to(x.dtype), r.view(-1)
    product = (grad * x).view(-1, D)
    grad_weight = torch.mv(product.t(), rows.to(x.dtype))
    shift = torch.mv(product, w).float().mul_(rows.pow(3)).div_(-D)
    grad_x = (grad * w).mul_(r.to(x.dtype)).addcmul_(x, shift.to(x.dtype).view(r.shape))
    return grad_x, grad_weight.to(weight.dtype)
