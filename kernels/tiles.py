"""Which tile an operation is computed in, as a pure function of its shape and the GPU: no autotuning, so that a shape
has the same tiles, and so the same bits, in every process.

S slots (tokens times experts per token), E experts, rows = S / E the mean number of rows of an expert.
"""

from typing import NamedTuple


class GemmTile(NamedTuple):
    """One configuration of a grouped GEMM."""

    block_m: int
    """Rows of slots (forward, dX), or of the weight gradient."""
    block_n: int
    """Columns of the output."""
    block_k: int
    """Elements of the inner dimension in a step."""
    num_warps: int
    num_stages: int
    """Steps in flight, as Triton counts them."""
    occupancy: int
    """Programs that one multiprocessor holds, which the persistent grid is sized by; the static gate checks it."""
    swap: bool = False
    """Whether the weights are the left operand of the tensor instruction, and the slots the right one."""
    halves: bool = False
    """Whether a last round that would leave half of the GPU idle is computed in tiles of half the columns."""


GROUP = 8
"""Row tiles of one expert that sweep the columns together, so that a weight tile is read from L2 by all of them."""

DECODE_TOKENS = 64
"""Tokens up to which experts run their decode kernels, where every chosen expert's weights are streamed once."""


def expert_gemm(arch: int, slots: int, experts: int, itemsize: int) -> GemmTile:
    """Tile of a training GEMM over the slots of all experts: forward and gradient by rows."""
    rows = slots / experts
    if itemsize == 4:
        return GemmTile(64, 64, 16, 8, 3, 1)
    if rows <= 64:
        return GemmTile(64, 256, 64, 4, 3, 1) if arch >= 90 else GemmTile(64, 128, 64, 4, 4, 1)
    return GemmTile(128, 256, 64, 8, 3, 1, halves=True)


def weight_gradient(arch: int, itemsize: int) -> GemmTile:
    """Tile of a weight gradient, whose inner dimension is the expert's slots."""
    if itemsize == 4:
        return GemmTile(64, 64, 16, 8, 3, 1)
    return GemmTile(128, 256, 64, 8, 3, 1)


def decode_gemm(arch: int, tokens: int, itemsize: int) -> GemmTile:
    """Tile of a decode GEMM, with room for all slots that one expert can get: its weights are read once."""
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if itemsize == 4:
        return GemmTile(rows, 64, 16, 8, 3, 1, arch >= 90)
    # The most stages with which two programs share a multiprocessor's memory.
    stages = {16: 6 if arch >= 90 else 5, 32: 5, 64: 4}[rows]
    return GemmTile(rows, 128, 64, 4, stages, 2, arch >= 90)


def decode_splits(columns: int, inner: int, choices: int, tile: GemmTile, sms: int) -> int:
    """Spans into which a decode GEMM cuts its inner dimension, so that one token's experts alone keep the GPU busy.

    It does not depend on the number of tokens, and so neither do the bits of a token's result.
    """
    programs = choices * -(-columns // tile.block_n)
    splits = 1
    while splits < 4 and splits * programs < sms and inner >= 2 * splits * 4 * tile.block_k:
        splits *= 2
    return splits


def whole_tiles(tiles: int, programs: int) -> int:
    """How many of a persistent kernel's tiles it computes whole, where it may halve those of its last round."""
    rest = tiles % programs
    return tiles - rest if 2 * rest <= programs else tiles


def gradient_chunk(slots: int, tiles_per_expert: int, sms: int, block_k: int) -> int:
    """Rows of an expert that one program of a weight gradient walks, a multiple of block_k.

    All of them if one expert's tiles fill the GPU; else so few that an expert that took every slot would fill it twice.
    """
    splits = 1 if tiles_per_expert >= sms else -(-2 * sms // tiles_per_expert)
    return max(8, -(-slots // splits // block_k)) * block_k
