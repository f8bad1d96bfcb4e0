"""Top-k, softmax, counts, offsets and the stable order of slots, all on the device and without a float atomic.

Three launches: tokens choose and blocks of them are counted; one program adds the counts up; every slot then knows its
place, its expert's offset plus the number of earlier slots of that expert. Up to BLOCK tokens take one launch. This is
the counting sort of MegaBlocks (Gale et al. 2022, section 5.2) with the place of a slot computed, not raced for.

N tokens, E experts, K experts per token, BLOCK tokens of one program, C blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch

TOKENS = 64
"""Tokens of one program."""
MOST_EXPERTS = 1024
"""Experts for which a block of tokens and their choices fit a program's registers."""


def unsupported(logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True) -> str | None:
    if logits.dtype != torch.float32:
        return f"routes float32 logits only, not {logits.dtype}"
    if bias is not None and bias.dtype != torch.float32:
        return f"adds float32 biases only, not {bias.dtype}"
    if logits.shape[1] > MOST_EXPERTS:
        return f"routes to at most {MOST_EXPERTS} experts, not {logits.shape[1]}"
    return None


def route(
    logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, E = logits.shape
    logits, bias = logits.contiguous(), None if bias is None else bias.contiguous()
    weights, experts = logits.new_empty(N, top_k), logits.new_empty(N, top_k, dtype=torch.int64)
    order, offsets = experts.new_empty(N * top_k), experts.new_zeros(E + 1)
    sizes = {"K": top_k, "WIDE_K": triton.next_power_of_2(top_k), "WIDE_E": triton.next_power_of_2(E)}
    sizes["BLOCK"] = min(TOKENS, max(1, 2048 // sizes["WIDE_E"]))
    blocks = triton.cdiv(N, sizes["BLOCK"])
    starts = experts.new_empty(blocks, E, dtype=torch.int32)
    alone = blocks == 1
    launch(
        choose_kernel, (blocks,), logits, bias, weights, experts, starts, order, offsets, N, E, NORMALIZE=normalize,
        ALONE=alone, **sizes,
    )  # fmt: skip
    if not alone:
        # 64 blocks of 256 experts would spill 248 bytes a thread (sm_90).
        chunk = min(64, max(1, 4096 // sizes["WIDE_E"]))
        launch(add_counts_kernel, (min(blocks, 1),), starts, offsets, blocks, E, CHUNK=chunk, WIDE_E=sizes["WIDE_E"])
        launch(place_kernel, (blocks,), experts, starts, order, N, E, **sizes)
    return weights, experts, order, offsets


@triton.jit
def choose_kernel(
    logits, bias, weights, experts, counts, order, offsets, N, E,
    K: tl.constexpr, WIDE_K: tl.constexpr, WIDE_E: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = token < N
    e, k = tl.arange(0, WIDE_E), tl.arange(0, WIDE_K)
    lowest = float("-inf")
    left = tl.load(logits + token[:, None] * E + e[None, :], mask=valid[:, None] & (e < E)[None, :], other=lowest)
    free = tl.zeros((BLOCK, WIDE_E), tl.int32) + (e < E).to(tl.int32)[None, :]
    values = tl.full((BLOCK, WIDE_K), lowest, tl.float32)
    choices = tl.zeros((BLOCK, WIDE_K), tl.int32)
    score, worth = left, left
    if bias is not None or not NORMALIZE:
        probability = tl.exp(left - tl.max(left, 1)[:, None])
        probability = probability / tl.sum(probability, 1)[:, None]
        if bias is not None:
            score = probability + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
        if not NORMALIZE:
            worth = probability
    # A NaN is chosen first, as torch's sort does, and makes the token's weights NaN: no choice is ever out of range.
    key = tl.where(score == score, score, float("inf"))
    for i in tl.static_range(K):
        # Among the free experts, those that hold the largest score; of them the lowest. A score of -inf can be chosen,
        # an expert twice cannot.
        top = tl.max(tl.where(free == 1, key, lowest), 1)
        index = tl.min(tl.where((free == 1) & (key == top[:, None]), e[None, :], WIDE_E), 1)
        mine = e[None, :] == index[:, None]
        free = tl.where(mine, 0, free)
        value = tl.sum(tl.where(mine, worth, 0.0), 1)
        values = tl.where(k[None, :] == i, value[:, None], values)
        choices = tl.where(k[None, :] == i, index[:, None], choices)
    if NORMALIZE:
        values = tl.exp(values - tl.max(values, 1)[:, None])
        values = values / tl.sum(values, 1)[:, None]
    inside = valid[:, None] & (k < K)[None, :]
    tl.store(weights + token[:, None] * K + k[None, :], values, mask=inside)
    tl.store(experts + token[:, None] * K + k[None, :], choices.to(tl.int64), mask=inside)
    chosen = tl.where(valid[:, None] & (e < E)[None, :], 1 - free, 0)
    count = tl.sum(chosen, 0)
    if ALONE:
        end = tl.cumsum(count, 0)
        tl.store(offsets + 1 + e, end.to(tl.int64), mask=e < E)
        position = (end - count)[None, :] + tl.cumsum(chosen, 0) - chosen
        for i in tl.static_range(K):
            mine = tl.sum(tl.where(k[None, :] == i, choices, 0), 1)
            index = tl.sum(tl.where(e[None, :] == mine[:, None], position, 0), 1)
            tl.store(order + index, token * K + i, mask=valid)
    else:
        tl.store(counts + block.to(tl.int64) * E + e, count, mask=e < E)


@triton.jit
def add_counts_kernel(starts, offsets, C, E, CHUNK: tl.constexpr, WIDE_E: tl.constexpr):
    """Replace each block's counts by the places of its first slots; write the offsets. One program."""
    e, c = tl.arange(0, WIDE_E), tl.arange(0, CHUNK)
    total = tl.zeros((WIDE_E,), tl.int32)
    for first in range(0, C, CHUNK):
        inside = (first + c < C)[:, None] & (e < E)[None, :]
        total += tl.sum(tl.load(starts + (first + c)[:, None] * E + e[None, :], mask=inside, other=0), 0)
    end = tl.cumsum(total, 0)
    tl.store(offsets + 1 + e, end.to(tl.int64), mask=e < E)
    start = end - total
    for first in range(0, C, CHUNK):
        inside = (first + c < C)[:, None] & (e < E)[None, :]
        pointers = starts + (first + c)[:, None] * E + e[None, :]
        count = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, start[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        start += tl.sum(count, 0)


@triton.jit
def place_kernel(
    experts, starts, order, N, E,
    K: tl.constexpr, WIDE_K: tl.constexpr, WIDE_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    valid = token < N
    e = tl.arange(0, WIDE_E)
    chosen = tl.zeros((BLOCK, WIDE_E), tl.int32)
    for k in tl.static_range(K):
        mine = tl.load(experts + token * K + k, mask=valid, other=-1)
        chosen += (e[None, :] == mine[:, None]).to(tl.int32)
    start = tl.load(starts + block * E + e, mask=e < E, other=0)
    position = start[None, :] + tl.cumsum(chosen, 0) - chosen
    for k in tl.static_range(K):
        mine = tl.load(experts + token * K + k, mask=valid, other=-1)
        index = tl.sum(tl.where(e[None, :] == mine[:, None], position, 0), 1)
        tl.store(order + index, token * K + k, mask=valid)
