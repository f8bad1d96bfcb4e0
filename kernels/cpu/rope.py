import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return unsupported_dtype(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    # Sines rounded to x's dtype, as Hugging Face does: torch has no vector code for products of mixed dtypes.
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation's transpose is the rotation by the opposite angle."""
    return rope(grad, cos, -sin)
