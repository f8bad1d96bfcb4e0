"""Gradient of the experts' matrices: for each expert, the product of two sets of sorted rows over its slots.

A program makes one output tile of one expert and walks the expert's rows in blocks. Whole blocks are loaded unmasked
(by TMA where there is any); the last block, which reaches into another expert's rows, is masked on both sides. When an
expert's tiles are too few to fill the GPU, an expert with many rows is cut into chunks: each writes a float32 partial,
which a second kernel adds in order. Nothing is added atomically, so a gradient has the same bits every time.

S slots, E experts, A and B widths of the two sets of rows, so that the gradient is (E, A, B).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.gpu.grouped import meta, tile_bound, tile_schedule
from kernels.gpu.launch import aligned, descriptor, launch, target


def weight_gradient(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """For each expert, a[rows] transposed times b[rows]: a (S, A), b (S, B) -> (E, A, B) in a's dtype."""
    (S, A), B, E = a.shape, b.shape[1], offsets.shape[0] - 1
    gpu = target(a.device)
    tile = tiles.weight_gradient(gpu.arch, a.itemsize)
    tma = gpu.has_tma and aligned(a, b)
    down, across = triton.cdiv(A, tile.block_m), triton.cdiv(B, tile.block_n)
    chunk = tiles.gradient_chunk(S, down * across, gpu.sms, tile.block_k)
    items = tile_bound(S, E, chunk)
    out = a.new_empty(E, A, B)
    partials = a.new_empty((items, A, B) if chunk < S else (1,), dtype=torch.float32)
    launch(
        gradient_kernel, (items * down * across,), descriptor(a, [tile.block_k, tile.block_m]) if tma else None,
        descriptor(b, [tile.block_k, tile.block_n]) if tma else None, a, b, out, partials,
        tile_schedule(offsets, S, chunk), offsets, A, B, chunk, TMA=tma, PARTIAL=chunk < S,
        EVEN=A % tile.block_m == 0 and B % tile.block_n == 0, **meta(tile),
    )  # fmt: skip
    block = 1024
    launch(
        # Blocks in the first dimension: the second has room for 65,535.
        finish_kernel, (triton.cdiv(A * B, block), E), out, partials, offsets, E, A * B, chunk,
        PARTIAL=chunk < S, WIDE_E=triton.next_power_of_2(E), BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit
def gradient_kernel(
    a_tiles, b_tiles, a, b, out, partials, schedule, offsets, A, B, chunk,
    TMA: tl.constexpr, PARTIAL: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(A, BLOCK_M), tl.cdiv(B, BLOCK_N)
    item = tl.program_id(0) // (down * across)
    if item >= tl.load(schedule):
        return
    expert = tl.load(schedule + 1 + 2 * item)
    first, last = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
    start = first + tl.load(schedule + 2 + 2 * item) * chunk
    end = min(start + chunk, last)

    inside = tl.program_id(0) % (down * across)
    top = inside // (GROUP * across) * GROUP
    height = min(down - top, GROUP)
    i = (top + (inside - top * across) % height) * BLOCK_M
    j = (inside - top * across) // height * BLOCK_N
    m, n, k = i + tl.arange(0, BLOCK_M), j + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # a's pointers are transposed: a tile that is transposed after its load is not copied asynchronously on sm_80.
    a_pointers = a + (start + k).to(tl.int64)[None, :] * A + m[:, None]
    b_pointers = b + (start + k).to(tl.int64)[:, None] * B + n[None, :]
    whole = (end - start) // BLOCK_K * BLOCK_K
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(0, whole, BLOCK_K):
        if TMA:
            x, y = a_tiles.load([start + row, i]).T, b_tiles.load([start + row, j])
        elif EVEN:
            x, y = tl.load(a_pointers), tl.load(b_pointers)
        else:
            x = tl.load(a_pointers, mask=(m < A)[:, None], other=0.0)
            y = tl.load(b_pointers, mask=(n < B)[None, :], other=0.0)
        accumulator = tl.dot(x, y, accumulator, input_precision="ieee")
        if not TMA:
            a_pointers += BLOCK_K * A
            b_pointers += BLOCK_K * B
    if whole < end - start:
        if TMA:
            a_pointers += whole.to(tl.int64) * A
            b_pointers += whole.to(tl.int64) * B
        left = k < end - start - whole
        x = tl.load(a_pointers, mask=left[None, :] & (m < A)[:, None], other=0.0)
        y = tl.load(b_pointers, mask=left[:, None] & (n < B)[None, :], other=0.0)
        accumulator = tl.dot(x, y, accumulator, input_precision="ieee")

    place = m.to(tl.int64)[:, None] * B + n[None, :]
    valid = (m < A)[:, None] & (n < B)[None, :]
    if PARTIAL and last - first > chunk:
        tl.store(partials + item.to(tl.int64) * A * B + place, accumulator, mask=valid)
    else:
        tl.store(out + expert.to(tl.int64) * A * B + place, accumulator.to(out.dtype.element_ty), mask=valid)


@triton.jit
def finish_kernel(
    out, partials, offsets, E, size, chunk, PARTIAL: tl.constexpr, WIDE_E: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros for an expert without rows, the sum of its partials for one with more than a chunk of them."""
    expert = tl.program_id(1)
    rows = (tl.load(offsets + expert + 1) - tl.load(offsets + expert)).to(tl.int32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pointers = out + expert.to(tl.int64) * size + i
    if rows == 0:
        tl.store(pointers, tl.zeros((BLOCK,), out.dtype.element_ty), mask=i < size)
    if PARTIAL and rows > chunk:
        e = tl.arange(0, WIDE_E)
        start = tl.load(offsets + e, mask=e < expert, other=0)
        end = tl.load(offsets + e + 1, mask=e < expert, other=0)
        item = tl.sum((end - start + chunk - 1) // chunk, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(tl.cdiv(rows, chunk)):
            total += tl.load(partials + (item + part) * size + i, mask=i < size)
        tl.store(pointers, total.to(out.dtype.element_ty), mask=i < size)
