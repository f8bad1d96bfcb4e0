"""Attention of new tokens against a paged cache (Kwon et al. 2023), split along the keys (flash-decoding, Dao et al.
2023) for any number of queries per sequence.

The rows of a tile are (query, head) pairs of one sequence that share a key-value head, so one read of the keys serves
them all. A program attends from a block of rows to one split of the keys, and a second kernel adds a query's splits in
order. Tiles and splits lie at fixed positions and a key that a query does not see adds an exact zero, so a query's bits
do not depend on what stands beside it.

N queries of S sequences, H query heads, G key-value heads, R = H / G, C channels of a head, P tokens of a page.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import MAX_CHANNELS, WORKSPACE_BYTES, paged_tile, row_blocks, split_bound
from kernels.gpu import unsupported_dtype
from kernels.gpu.launch import launch, target

MOST_REGISTERS = 255
"""Said outright on sm_80, else the assembler spills to make room for programs that shared memory has none for (12 heads
of 128 on 4: 16 bytes at 168 registers, none at 234)."""

LOWEST = tl.constexpr(-1e38)
"""Below every score and finite: where a row has seen no key yet, -inf - -inf would be NaN."""


def unsupported(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> str | None:  # fmt: skip
    if q.shape[2] > MAX_CHANNELS:
        return f"has heads of up to {MAX_CHANNELS} channels, not {q.shape[2]}"
    for pages in (k_pages, v_pages):
        if pages.dtype not in (q.dtype, torch.int8):
            return f"reads pages of the queries' {q.dtype} or of int8, not {pages.dtype}"
        if pages.stride(3) != 1:
            return f"reads pages whose channels lie side by side, not {pages.stride(3)} apart"
        if pages.shape[1] * pages.stride(1) >= 2**31:
            return f"reads pages within 2^31 elements, not of {pages.shape[1]} tokens that lie {pages.stride(1)} apart"
    return unsupported_dtype(q)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q = q.contiguous()
    (N, H, C), (_, P, G, _), (S, width) = q.shape, k_pages.shape, page_table.shape
    R, arch = H // G, target(q.device).arch
    tile = paged_tile(arch, R, C, q.itemsize, k_pages.itemsize)
    splits = split_bound(tile, width * P)
    block_c = max(16, triton.next_power_of_2(C))
    out = torch.empty_like(q)
    per_launch = N if splits == 1 else max(1, WORKSPACE_BYTES // (q.itemsize * splits * H * C))
    for first in range(0, N, per_launch):
        n = min(per_launch, N - first)
        # With one split, its result is the result. Else it is rounded as a result is: float32 would double the bytes,
        # 6% of those of the keys and values of 16 heads.
        partial = out if splits == 1 else q.new_empty(splits, n, H, C)
        lse = None if splits == 1 else q.new_empty(splits, n, H, dtype=torch.float32)
        launch(
            attend_splits, (row_blocks(n, S, R, tile.block_m), G, splits),
            q, k_pages, v_pages, k_scales, v_scales, page_table, query_offsets, lengths, partial, lse,
            first, n, S, G, math.log2(math.e) / math.sqrt(C),
            *k_pages.stride()[:3], *v_pages.stride()[:3], *strides(k_scales), *strides(v_scales), *page_table.stride(),
            R=R, C=C, P=P, SPLIT=tile.split, FINE=tile.fine, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_C=block_c, STAGE_V=arch < 90 and v_pages.dtype == torch.int8,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MOST_REGISTERS if arch < 90 else None,
        )  # fmt: skip
        if splits > 1:
            launch(
                merge_splits, (n, H), partial, lse, out, first, n, splits,
                C=C, BLOCK_P=min(64, 8192 // block_c), BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
    return out


def strides(scales: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scales is None else scales.stride()


@triton.jit
def first_block(queries, s, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where sequence s begins among all blocks, after s sequences with `queries` queries in all.

    Each of the two bounds leaves every sequence the blocks it needs, so the lower does. At s = S it is `row_blocks`.
    """
    return tl.minimum(queries * tl.cdiv(R, BLOCK_M), queries * R // BLOCK_M + s)


@triton.jit
def within(offset, first_query, n):
    """How many of the queries first_query : first_query + n come before query `offset`."""
    return tl.minimum(tl.maximum(offset - first_query, 0), n)


@triton.jit
def sequence_of(block, query_offsets, first_query, n, S, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence that begins at or before `block` among the queries first_query : first_query + n.

    A search with scalar loads: what a reduction returns counts as divergent, and so would every branch that it decides.
    """
    low, high = 0, S
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(within(tl.load(query_offsets + middle), first_query, n), middle, R, BLOCK_M) <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def split_start(split, SPLIT: tl.constexpr, FINE: tl.constexpr):
    """First key of a split: of SPLIT keys each at first, of twice as many after FINE of them."""
    return (split + tl.maximum(split - FINE, 0)) * SPLIT


@triton.jit(do_not_specialize=["first_query", "n", "S"])
def attend_splits(
    q, k_pages, v_pages, k_scales, v_scales, page_table, query_offsets, lengths, partial, lse,
    first_query, n, S, G, scale,
    stride_kp, stride_kt, stride_kg, stride_vp, stride_vt, stride_vg,
    stride_ksp, stride_kst, stride_ksg, stride_vsp, stride_vst, stride_vsg, stride_ts, stride_tp,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr, FINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGE_V: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split: its softmax-weighted mean of the values, and log2 of its weights' sum.

    partial (splits, n, H, C), and lse (splits, n, H) float32; or partial (N, H, C) and no lse, where one split is all.
    """
    block, g, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    s = sequence_of(block, query_offsets, first_query, n, S, R, BLOCK_M)
    end = tl.load(query_offsets + s + 1)
    first = within(tl.load(query_offsets + s), first_query, n)
    queries = (within(end, first_query, n) - first).to(tl.int32)
    first_row = ((block - first_block(first, s, R, BLOCK_M)) * BLOCK_M).to(tl.int32)
    first_position = (tl.load(lengths + s) - (end - first_query - first)).to(tl.int32)
    # The block's last query sees the keys before `stop`.
    stop = first_position + tl.minimum((first_row + BLOCK_M - 1) // R + 1, queries)
    begin = split_start(split, SPLIT, FINE)
    stop = tl.minimum(stop, split_start(split + 1, SPLIT, FINE))
    if first_row >= queries * R:
        return

    # Offsets inside a block of rows and inside a page fit 32 bits, which halves their registers.
    channels = tl.arange(0, BLOCK_C)
    rows = first_row % R + tl.arange(0, BLOCK_M)
    block_query = first_row // R
    real = rows < (queries - block_query) * R
    inside = real[:, None] & (channels < C)[None, :]
    row_offsets = rows // R * (R * G) + rows % R
    offsets = row_offsets[:, None] * C + channels[None, :]
    first_head = (first_query + first + block_query) * (R * G) + g * R
    partial_head = first_head + (split.to(tl.int64) * n - first_query) * (R * G)
    q_tile = tl.load(q + first_head * C + offsets, mask=inside, other=0.0)
    position = first_position + tl.minimum(block_query + rows // R, queries - 1)

    k_pages += g * stride_kg
    v_pages += g * stride_vg
    page_table += s * stride_ts
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in tl.range(begin, stop, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        written = keys < stop
        if P % BLOCK_N == 0:
            page = tl.load(page_table + start // P * stride_tp)
            row_page = page
        else:
            page = tl.load(page_table + keys // P * stride_tp, mask=written, other=0)
            row_page = page[:, None]
        token = keys % P
        # Rows that hold no token yet may hold anything, and a zero probability does not silence a NaN.
        present = written[:, None] & (channels < C)[None, :]
        k_offsets = token[:, None] * stride_kt + channels[None, :]
        v_offsets = token[:, None] * stride_vt + channels[None, :]
        k = tl.load(k_pages + row_page * stride_kp + k_offsets, mask=present, other=0).to(q_tile.dtype)
        v = tl.load(v_pages + row_page * stride_vp + v_offsets, mask=present, other=0).to(q_tile.dtype)
        if STAGE_V:
            # HMMA would read 8-bit values byte by byte. A mask that is not a load's keeps Triton from converting them
            # inside the operand: they go back to shared memory in 16 bits.
            v = tl.where(written[:, None], v, 0.0)
        scores = tl.dot(q_tile, k.T, input_precision="ieee") * scale
        if k_scales is not None:
            k_scale = k_scales + page * stride_ksp + token * stride_kst + g * stride_ksg
            scores *= tl.load(k_scale, mask=written, other=0.0)[None, :]
        scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if v_scales is not None:
            v_scale = v_scales + page * stride_vsp + token * stride_vst + g * stride_vsg
            p *= tl.load(v_scale, mask=written, other=0.0)[None, :]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    # A NaN is not 0: rows that have one are stored, and the merge hands it on.
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    # Of a split that a row does not see, nothing but the sum 0 is written: the merge then need not look up which
    # sequence a query is of, which with 16 of them is 5 loads, each waiting for the last.
    tl.store(partial + partial_head * C + offsets, acc / total[:, None], mask=inside & seen[:, None])
    if lse is not None:
        tl.store(lse + partial_head + row_offsets, tl.where(seen, top + tl.log2(total), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["first_query", "n", "splits"])
def merge_splits(
    partial, lse, out, first_query, n, splits, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of the splits weighted by 2^lse, which is 0 for those that a query does not see: one program per query and
    head."""
    query, h, H = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    channels = tl.arange(0, BLOCK_C)
    lse += query * H + h
    partial += (query * H + h) * C
    top = float("-inf")
    for start in range(0, splits, 8 * BLOCK_P):
        split = start + tl.arange(0, 8 * BLOCK_P).to(tl.int64)
        top = tl.maximum(top, tl.max(tl.load(lse + split * n * H, mask=split < splits, other=float("-inf")), 0))
    total = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_P):
        split = start + tl.arange(0, BLOCK_P).to(tl.int64)
        weight = tl.exp2(tl.load(lse + split * n * H, mask=split < splits, other=float("-inf")) - top)
        # Where nothing is seen nothing was written.
        inside = (weight > 0)[:, None] & (channels < C)[None, :]
        part = tl.load(partial + (split * n * H * C)[:, None] + channels[None, :], mask=inside, other=0.0)
        total += weight
        acc += weight[:, None] * part.to(tl.float32)
    mean = tl.sum(acc, 0) / tl.sum(total, 0)
    tl.store(out + ((first_query + query) * H + h) * C + channels, mean, mask=channels < C)
