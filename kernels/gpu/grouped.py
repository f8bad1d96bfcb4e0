"""Products of sorted rows with their experts' matrices: the tile schedule and the kernels that share it.

Rows are slots sorted by expert; expert e owns rows offsets[e] to offsets[e + 1]. A tile is BLOCK_M rows of one expert
by BLOCK_N columns. The number of tiles is known on the device alone, so a kernel's programs, as many as the GPU holds
at once, walk the list and stop at its end; GROUP row tiles sweep the columns together, so that a tile of the weights is
read from L2 by all of them (Triton's tutorials 08 and 09). Where the last round of tiles would leave half of the
programs idle, every tile of it is cut into two halves of its columns, one for each of two programs; the order in which
an element is summed stays the same. What a tile holds beyond its expert's rows is computed from whatever lies there and
never stored: rows of a product do not mix.

S slots, E experts, M rows of a tile, N columns of the output, K inner dimension, D hidden width, F expert width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import aligned, descriptor, launch, target
from kernels.tiles import GROUP, GemmTile


def tile_schedule(offsets: Tensor, slots: int, block: int) -> Tensor:
    """The row tiles of every expert: int32 (1 + 2 * bound,), the number of tiles and then expert and block of each."""
    bound, experts = tile_bound(slots, offsets.shape[0] - 1, block), offsets.shape[0] - 1
    schedule = offsets.new_empty(1 + 2 * bound, dtype=torch.int32)
    wide = triton.next_power_of_2(experts)
    entries = max(16, min(256, 8192 // wide))
    grid = (triton.cdiv(bound + 1, entries),)
    launch(schedule_kernel, grid, offsets, schedule, experts, block, ENTRIES=entries, WIDE_E=wide)
    return schedule


def tile_bound(slots: int, experts: int, block: int) -> int:
    """Most row tiles that `slots` rows of `experts` experts can make: each expert has at most one that is not full."""
    return min(slots, slots // block + experts)


@triton.jit
def schedule_kernel(offsets, schedule, E, block, ENTRIES: tl.constexpr, WIDE_E: tl.constexpr):
    e = tl.arange(0, WIDE_E)
    start = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = ((end - start + block - 1) // block).to(tl.int32)
    last = tl.cumsum(tiles, 0)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    before = (last[None, :] <= entry[:, None]).to(tl.int32)
    expert = tl.sum(before, 1)
    number = entry - tl.sum(before * tiles[None, :], 1)
    total = tl.sum(tiles, 0)
    tl.store(schedule + 1 + 2 * entry, expert, mask=entry < total)
    tl.store(schedule + 2 + 2 * entry, number, mask=entry < total)
    tl.store(schedule + entry, total, mask=entry == 0)


@triton.jit
def find_tile(tile, schedule, offsets, columns, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Expert, first row, end of the expert's rows, and column of a tile's number; `columns` tiles lie side by side."""
    entry = tile // columns
    expert = tl.load(schedule + 1 + 2 * entry)
    first_entry = entry - tl.load(schedule + 2 + 2 * entry)
    start, end = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
    local = tile - first_entry * columns
    group = local // (GROUP * columns) * GROUP
    height = min((end - start + BLOCK_M - 1) // BLOCK_M - group, GROUP)
    inside = local - group * columns
    return expert, start + (group + inside % height) * BLOCK_M, end, inside // height


@triton.jit
def whole_tiles(tiles, HALVES: tl.constexpr):
    """How many tiles are computed whole; kernels.tiles.whole_tiles says the same on the host."""
    rest = tiles % tl.num_programs(0)
    return tiles - rest if HALVES and 2 * rest <= tl.num_programs(0) else tiles


@triton.jit
def halves_left(schedule, columns, whole):
    """Reads the schedule again: the number of tiles, kept over the loop, made sm_90 spill 8 bytes."""
    return 2 * (tl.load(schedule) * columns - whole)


@triton.jit
def product(
    a, a_rows, row, b, expert, column, N, K, begin, stop,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_IS_KN: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_M, BLOCK_N), float32, of rows of a (.., K) times the expert's matrix, summed from begin to stop.

    With TMA `a` and `b` are descriptors, else pointers. b is (E, PARTS * N, K), of which the tile takes BLOCK_N / PARTS
    neighbouring rows of each part, part after part; or, B_IS_KN, (E, K, N) as it is. EVEN says that no block crosses
    the end of K, nor of N where N is contiguous. SWAP makes the matrix the left operand of the tensor instruction,
    which on sm_90 takes 64 rows there at least and as few as 8 on the right.
    """
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    first = column * WIDTH
    k = begin + tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_N)
    if not A_TMA:
        a_pointers = a + a_rows.to(tl.int64)[:, None] * K + k[None, :]
    if not B_TMA:
        if B_IS_KN:
            b_pointers = b + (expert.to(tl.int64) * K + k)[:, None] * N + (first + j)[None, :]
        else:
            # A column past the end reads the last row again: it is not stored.
            line = (expert.to(tl.int64) * PARTS + j // WIDTH) * N + tl.minimum(first + j % WIDTH, N - 1)
            b_pointers = b + line[:, None] * K + k[None, :]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, stop, BLOCK_K):
        if A_TMA:
            x = a.load([row, step])
        else:
            x = tl.load(a_pointers) if EVEN else tl.load(a_pointers, mask=(k < K + begin - step)[None, :], other=0.0)
            a_pointers += BLOCK_K
        if B_TMA:
            if B_IS_KN:
                y = b.load([expert, step, first]).reshape(BLOCK_K, BLOCK_N)
            else:
                y = b.load([expert * PARTS, first, step]).reshape(BLOCK_N, BLOCK_K).T
        elif B_IS_KN:
            inside = (k < K + begin - step)[:, None] & (first + j < N)[None, :]
            y = tl.load(b_pointers) if EVEN else tl.load(b_pointers, mask=inside, other=0.0)
            b_pointers += BLOCK_K * N
        else:
            y = (
                tl.load(b_pointers) if EVEN else tl.load(b_pointers, mask=(k < K + begin - step)[None, :], other=0.0)
            ).T
            b_pointers += BLOCK_K
        if SWAP:
            accumulator = tl.dot(y.T, x.T, accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(x, y, accumulator, input_precision="ieee")
    return accumulator.T if SWAP else accumulator


@triton.jit
def rows_kernel(
    a, b, b_half, out, order, schedule, offsets, S, N, K, span,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_IS_KN: tl.constexpr, SCATTER: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr, SPLITS: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (SPLITS, S, N): rows of a (S, K) times their experts' matrices, each split summing its `span` of K; with
    SCATTER row i goes to order[i]."""
    columns = tl.cdiv(N, BLOCK_N)
    tiles = tl.load(schedule) * columns
    whole = whole_tiles(tiles * SPLITS, HALVES)
    for number in range(tl.program_id(0), whole, tl.num_programs(0)):
        split = number // tiles if SPLITS > 1 else 0
        expert, row, end, column = find_tile(number - split * tiles, schedule, offsets, columns, BLOCK_M, GROUP)
        rows_tile(
            a, b, out, order, expert, row, end, column, split, S, N, K, span,
            A_TMA, B_TMA, B_IS_KN, SCATTER, EVEN, SWAP, SPLITS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HALVES:
        half = tl.program_id(0)
        if half < halves_left(schedule, columns, whole):
            expert, row, end, column = find_tile(whole + half // 2, schedule, offsets, columns, BLOCK_M, GROUP)
            rows_tile(
                a, b_half, out, order, expert, row, end, 2 * column + half % 2, 0, S, N, K, span,
                A_TMA, B_TMA, B_IS_KN, SCATTER, EVEN, SWAP, 1, BLOCK_M, BLOCK_N // 2, BLOCK_K,
            )  # fmt: skip


@triton.jit
def rows_tile(
    a, b, out, order, expert, row, end, column, split, S, N, K, span,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_IS_KN: tl.constexpr, SCATTER: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    begin = split * span
    stop = min(begin + span, K) if SPLITS > 1 else K
    rows = row + tl.arange(0, BLOCK_M)
    y = product(
        a, tl.minimum(rows, end - 1), row, b, expert, column, N, K, begin, stop,
        A_TMA, B_TMA, B_IS_KN, 1, EVEN, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.load(order + rows, mask=rows < end, other=0) if SCATTER else rows
    line = place.to(tl.int64) + (split.to(tl.int64) * S if SPLITS > 1 else 0)
    pointers = out + line[:, None] * N + n[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (n < N)[None, :])


def matrix(weight: Tensor, block: list[int], parts: int = 1) -> object:
    """Descriptor of weights (E, R, C) in tiles of `block`, R cut into `parts`: what crosses an expert's end reads 0."""
    E, R, C = weight.shape
    return descriptor(weight.view(E * parts, R // parts, C), [parts, *block])


def multiply_rows(
    a: Tensor, weight: Tensor, offsets: Tensor, schedule: Tensor, tile: GemmTile,
    *, transposed: bool, order: Tensor | None = None, splits: int = 1,
) -> Tensor:  # fmt: skip
    """Rows a (S, K) times weight[e] (N, K) transposed, or (K, N) as it is if not `transposed`: (S, N) in a's dtype.

    With `order` (S,) row i of the result is row order[i] of the output. With `splits` > 1 the inner dimension is cut
    into as many spans, whose products come apart, (splits, S, N) float32. `schedule` is that of tile.block_m.
    """
    (S, K), (E, rows, columns) = a.shape, weight.shape
    N = rows if transposed else columns
    out = a.new_empty(S, N) if splits == 1 else a.new_empty(splits, S, N, dtype=torch.float32)
    span = triton.cdiv(triton.cdiv(K, splits), tile.block_k) * tile.block_k
    gpu = target(a.device)
    tma = gpu.has_tma and aligned(a, weight)
    even = K % tile.block_k == 0 and (transposed or N % tile.block_n == 0)
    k = tile.block_k
    whole, half = ([n, k] if transposed else [k, n] for n in (tile.block_n, tile.block_n // 2))
    launch(
        rows_kernel, grid(gpu.sms, tile, S, E, N, splits), descriptor(a, [tile.block_m, k]) if tma else a,
        matrix(weight, whole) if tma else weight, matrix(weight, half) if tma else weight, out, order, schedule,
        offsets, S, N, K, span,
        A_TMA=tma, B_TMA=tma, B_IS_KN=not transposed, SCATTER=order is not None, EVEN=even, SWAP=tile.swap,
        SPLITS=splits, HALVES=tile.halves, **meta(tile),
    )  # fmt: skip
    return out


def grid(sms: int, tile: GemmTile, slots: int, experts: int, columns: int, splits: int = 1) -> tuple[int]:
    """As many programs as the GPU holds at once, or as there can be tiles or halves of tiles."""
    tiles = tile_bound(slots, experts, tile.block_m) * triton.cdiv(columns, tile.block_n) * splits
    return (min(sms * tile.occupancy, 2 * tiles if tile.halves else tiles),)


def meta(tile: GemmTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": GROUP,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
