"""Which tiles paged attention is computed in, as a pure function of the heads' shape and the GPU.

Neither the batch, nor the number of queries, nor a sequence's length has a say: a query that meets its keys in the same
tiles and the same order whatever stands beside it has the same bits (He et al. 2025, "Defeating nondeterminism in LLM
inference").

N queries of S sequences, C channels of a head, R query heads that share a key-value head.
"""

import math
from typing import NamedTuple

MAX_CHANNELS = 256
"""Widest head: its accumulator takes half of the registers."""

WORKSPACE_BYTES = 1 << 28
"""Partial results of one launch. Queries that would need more are computed in several launches, one after the other."""

IN_FLIGHT = {80: 24 << 10, 90: 40 << 10}
"""Bytes of keys and values that should be on their way to a multiprocessor, by architecture. A GPU that waits 600 or
700 ns for memory needs 11 or 18 KB of them; twice that leaves room for programs that begin and end."""

FINE = 16
"""Short splits of a sequence. One of 131,072 tokens has 136 splits in all, which fill 132 SMs; its partial results are
2% of what 16 heads read."""


class PagedTile(NamedTuple):
    """One configuration of paged attention."""

    block_m: int
    """Rows: (query, head) pairs of one sequence that share a key-value head."""
    block_n: int
    """Keys in a step."""
    split: int
    """Keys that one program visits; twice as many beyond the first `fine` splits."""
    fine: int
    """Splits that are short: few keys would leave a GPU idle, and many make more partial results than it takes."""
    num_warps: int
    num_stages: int
    """As Triton counts them: 2 n + 3 keep n steps in flight, as the page of a step is looked up before it is read."""


def paged_tile(arch: int, R: int, C: int, itemsize: int, page_itemsize: int) -> PagedTile:
    """Tile for queries of `itemsize` bytes against pages of `page_itemsize`.

    A step stays bound by memory however few of its rows are real, so a few heads take what their tensor instruction
    gives: 64 rows on `arch` 90, and on 80 the 32 that let two programs share a multiprocessor. From 64 heads on, each
    block would read the keys again, and L2 would be the bound: there, and where 90 has no registers for 256 channels
    in one warpgroup, 128 rows.
    """
    split = 512
    if itemsize == 4:
        return PagedTile(16, 32, split, FINE, 4, 3)
    wide = C > 128
    if (arch >= 90 and wide) or (R >= 64 and not wide):
        # 8-bit keys pass through registers on 80, of which 128 rows leave too few.
        block_m, num_warps = 64 if arch < 90 and page_itemsize == 1 else 128, 8
    else:
        block_m, num_warps = 64 if arch >= 90 else 32, 4
    block_n = 32 if wide else 64
    # Of large programs a multiprocessor may hold one only, of the others two or more.
    large = wide or num_warps == 8
    steps = math.ceil(IN_FLIGHT[90 if arch >= 90 else 80] / (1 if large else 2) / (2 * block_n * C * page_itemsize))
    return PagedTile(block_m, block_n, split, FINE, num_warps, 3 + 2 * min(steps, 5))


def row_blocks(N: int, S: int, R: int, block_m: int) -> int:
    """The most blocks of rows that N queries of S sequences take, whichever sequence each belongs to."""
    return min(N * -(-R // block_m), N * R // block_m + S)


def split_bound(tile: PagedTile, tokens: int) -> int:
    """Splits of a sequence of `tokens`."""
    short = -(-tokens // tile.split)
    return min(short, tile.fine + -(-(short - tile.fine) // 2))
