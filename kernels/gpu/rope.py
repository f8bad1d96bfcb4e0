"""Rotary position embedding (Su et al. 2021) in Hugging Face's channel order, its own gradient at the opposite angle.

N tokens, H heads, C channels of a head, of which c and c + C / 2 turn together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import unsupported_dtype
from kernels.gpu.launch import launch

TILE = 2048
"""Channel pairs that a program turns: 16 a thread."""


def unsupported(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return unsupported_dtype(x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    N, H, C = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(C // 2)
    rows = max(1, TILE // block)
    launch(
        rope_kernel, (triton.cdiv(N * H, rows),), x, cos.contiguous(), sin.contiguous(), out, N * H, H, C // 2,
        x.stride(0), x.stride(1), ROWS=rows, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@triton.jit
def rope_kernel(
    x, cos, sin, out, ROWS_TOTAL, H, HALF, STRIDE_N, STRIDE_H, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (row < ROWS_TOTAL) & (c < HALF)
    token, head = (row // H).to(tl.int64), row % H
    cosine = tl.load(cos + token * HALF + c, inside, other=0.0)
    sine = tl.load(sin + token * HALF + c, inside, other=0.0)
    source = x + token * STRIDE_N + head * STRIDE_H + c
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, inside, other=0.0).to(tl.float32)
    first, second = turn(first, second, cosine, sine)
    target = out + row.to(tl.int64) * (2 * HALF) + c
    tl.store(target, first, inside)
    tl.store(target + HALF, second, inside)


@triton.jit
def turn(first, second, cosine, sine):
    return first * cosine - second * sine, second * cosine + first * sine
