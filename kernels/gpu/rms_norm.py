"""RMSNorm (Zhang & Sennrich 2019, eq. 4), alone or of a sum with the residual stream, and its gradient.

A row is held in registers, in float32, from its one read to its one write. With r = 1 / rms(x) and y = x r w, the
gradients are dx = r (g w - x r mean(g w x r)) and dw = sum over rows of g x r: each program of the backward adds up a
fixed range of rows for dw, and the partial sums are added in a fixed order.

N rows, D hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import unsupported_dtype
from kernels.gpu.launch import launch, target

MAX_WIDTH = 16384
"""Widest row: the gradient of a wider one would not fit the registers."""
TILE = 2048
"""Elements that a program holds at once; narrow rows share it."""
PROGRAMS_PER_SM = 4
"""Programs of the backward per multiprocessor: enough to hide each other's loads, few enough partial sums."""


def unsupported(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> str | None:
    if x.shape[-1] > MAX_WIDTH:
        return f"normalises rows of up to {MAX_WIDTH} elements, not {x.shape[-1]}"
    return unsupported_dtype(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm_forward(x, weight, eps)[0]
    return add_rms_norm_forward(x, weight, eps, residual)[:2]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output (..., D) and the inverse root mean squares r, float32 (..., 1)."""
    out, _, r = forward(x, weight, eps, None)
    return out, r


def add_rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output (..., D), the sum x + residual (..., D) that it is the norm of, and r, float32 (..., 1)."""
    return forward(x, weight, eps, residual)


def forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    block, rows, warps = tile(D)
    x, weight = x.contiguous(), weight.to(x.dtype)
    out, r = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    addend, total = (x, x) if residual is None else (residual.contiguous(), torch.empty_like(x))
    launch(
        forward_kernel, (triton.cdiv(r.numel(), rows),), x, addend, weight, out, total, r, r.numel(), D, eps,
        ROWS=rows, BLOCK_D=block, HAS_RESIDUAL=residual is not None, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out, total, r


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and weight (D,). x is the sum where there was a residual, and `grad_sum` what reaches it
    by the way of the stream, which is added."""
    D = x.shape[-1]
    block, rows, warps = tile(D)
    grad, x = grad.contiguous(), x.contiguous()
    addend = grad if grad_sum is None else grad_sum.contiguous()
    # Every program gets the same whole number of tiles, the last ones fewer.
    share = rows * max(1, triton.cdiv(r.numel(), rows * PROGRAMS_PER_SM * target(x.device).sms))
    programs = triton.cdiv(r.numel(), share)
    grad_x, partial = torch.empty_like(x), x.new_empty(programs, D, dtype=torch.float32)
    launch(
        backward_kernel, (programs,), grad, x, weight.to(x.dtype), r, addend, grad_x, partial, r.numel(), D, share,
        ROWS=rows, BLOCK_D=block, HAS_SUM=grad_sum is not None, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def tile(D: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps: 16 elements a thread, two vectors of bfloat16."""
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // block)
    return block, rows, min(32, block * rows // 512)


@triton.jit
def forward_kernel(
    x, addend, weight, out, total, r, N, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (d < D)[None, :]
    at = row[:, None].to(tl.int64) * D + d[None, :]
    value = tl.load(x + at, inside, other=0.0)
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(addend + at, inside, other=0.0)).to(total.dtype.element_ty)
        tl.store(total + at, value, inside)
    value = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    w = tl.load(weight + d, d < D, other=0.0).to(tl.float32)
    tl.store(out + at, value * inverse[:, None] * w[None, :], inside)
    tl.store(r + row, inverse, row < N)


@triton.jit
def backward_kernel(
    grad, x, weight, r, addend, grad_x, partial, N, D, SHARE,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SUM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * SHARE
    d = tl.arange(0, BLOCK_D)
    grad_w = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + SHARE, N), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (d < D)[None, :]
        at = row[:, None].to(tl.int64) * D + d[None, :]
        g = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        inverse = tl.load(r + row, row < N, other=0.0)[:, None]
        normed = tl.load(x + at, inside, other=0.0).to(tl.float32) * inverse
        grad_w += g * normed
        g *= tl.load(weight + d, d < D, other=0.0).to(tl.float32)[None, :]
        mean = tl.sum(g * normed, 1) / D
        value = inverse * g - (inverse * mean[:, None]) * normed
        if HAS_SUM:
            value += tl.load(addend + at, inside, other=0.0)
        tl.store(grad_x + at, value, inside)
    tl.store(partial + tl.program_id(0) * D + d, tl.sum(grad_w, 0), d < D)
