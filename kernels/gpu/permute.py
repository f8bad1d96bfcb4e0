"""Rows from tokens to sorted slots and back: a copy, and the sum over each token's choices.

N tokens, K choices per token, S = N * K slots, D width. One program sums a token's choices in order, so that nothing is
added atomically and a sum has the same bits every time.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch


def block_of(rows: int, D: int) -> tuple[int, int]:
    """Rows and columns of one program: 4,096 elements, 16 bytes to a thread and several loads in flight."""
    wide = min(triton.next_power_of_2(D), 2048)
    return min(4096 // wide, triton.next_power_of_2(max(rows, 1))), wide


def gather(x: Tensor, order: Tensor, choices: int) -> Tensor:
    """Row of every sorted slot's token, (S, D)."""
    S, D = order.shape[0], x.shape[1]
    x, out = x.contiguous(), x.new_empty(S, D)
    rows, wide = block_of(S, D)
    grid = (triton.cdiv(S, rows), triton.cdiv(D, wide))
    launch(gather_kernel, grid, x, order, out, S, D, CHOICES=choices, ROWS=rows, BLOCK=wide)
    return out


@triton.jit
def gather_kernel(x, order, out, S, D, CHOICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < S)[:, None] & (d < D)[None, :]
    token = tl.load(order + row, mask=row < S, other=0) // CHOICES
    value = tl.load(x + token[:, None] * D + d[None, :], mask=inside)
    tl.store(out + row[:, None] * D + d[None, :], value, mask=inside)


def combine(y: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    """Sum over a token's choices of y (parts, S, D) or (S, D), times the router weights (N, K) if given: (N, D).

    Choices in order, and within a choice the parts in order, in float32; the result has the dtype of `like` (N, D).
    """
    out = like.new_empty(like.shape)
    (N, D), (S, parts) = like.shape, (y.shape[-2], y.shape[0] if y.dim() == 3 else 1)
    rows, wide = block_of(N, D)
    launch(
        combine_kernel, (triton.cdiv(N, rows), triton.cdiv(D, wide)), y, weights, out, N, S, D,
        CHOICES=S // max(N, 1), PARTS=parts, WEIGHTED=weights is not None, ROWS=rows, BLOCK=wide,
    )  # fmt: skip
    return out


@triton.jit
def combine_kernel(
    y, weights, out, N, S, D,
    CHOICES: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < N)[:, None] & (d < D)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(CHOICES):
        slot = token * CHOICES + k
        part = tl.zeros((ROWS, BLOCK), tl.float32)
        for p in tl.static_range(PARTS):
            part += tl.load(y + (p * S + slot)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + slot, mask=token < N, other=0.0)[:, None] if WEIGHTED else part
    tl.store(out + token[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)
