"""One product per group of rows, and its gradients, with the kernels of the experts' MLPs.

M rows, D inner dimension, F columns, E groups.
"""

from torch import Tensor

from kernels import tiles
from kernels.gpu import unsupported_dtype
from kernels.gpu.grouped import multiply_rows, tile_schedule
from kernels.gpu.launch import target
from kernels.gpu.weight_gradient import weight_gradient


def unsupported(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return unsupported_dtype(x)


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return multiply(x, weight, offsets, transposed=True)


def grouped_gemm_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (M, D) and weight (E, F, D)."""
    grad_weight = weight_gradient(grad.contiguous(), x.contiguous(), offsets)
    return multiply(grad, weight, offsets, transposed=False), grad_weight.to(weight.dtype)


def multiply(x: Tensor, weight: Tensor, offsets: Tensor, *, transposed: bool) -> Tensor:
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    tile = tiles.expert_gemm(target(x.device).arch, x.shape[0], weight.shape[0], x.itemsize)
    schedule = tile_schedule(offsets, x.shape[0], tile.block_m)
    return multiply_rows(x, weight, offsets, schedule, tile, transposed=transposed)
