"""Attention of a few new tokens against a paged cache, in pieces whose shapes do not depend on the batch.

To give a query the same bits whoever shares its step, every sequence is computed by itself, its queries in blocks of
QUERY_BLOCK rows (short ones padded), its keys a page at a time, and pages are added in order. A page that a query
cannot see adds an exact zero.
"""

import math

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype

QUERY_BLOCK = 8


def unsupported(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> str | None:  # fmt: skip
    return unsupported_dtype(q)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q)
    bounds = query_offsets.tolist()
    P = k_pages.shape[1]
    for s, length in enumerate(lengths.tolist()):
        pages = page_table[s, : -(-length // P)]
        keys, values = (cached.index_select(0, pages).to(q.dtype) for cached in (k_pages, v_pages))
        key_scales, value_scales = (
            None if scales is None else scales.index_select(0, pages) for scales in (k_scales, v_scales)
        )
        # Rows that hold no token yet may hold anything, and a zero probability does not silence a NaN.
        values.flatten(0, 1)[length:] = 0
        if value_scales is not None:
            value_scales.flatten(0, 1)[length:] = 0
        for start in range(bounds[s], bounds[s + 1], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, bounds[s + 1])
            first = length - (bounds[s + 1] - start)
            out[start:end] = attend_block(q[start:end], keys, values, first, key_scales, value_scales)
    return out


def attend_block(
    q: Tensor, keys: Tensor, values: Tensor, first: int, key_scales: Tensor | None, value_scales: Tensor | None
) -> Tensor:
    """Queries (n <= QUERY_BLOCK, H, C) at positions first, first + 1, ... against pages (pages, P, G, C).

    Scales (pages, P, G) of 8-bit keys multiply the scores, those of values the probabilities.
    """
    n, H, C = q.shape
    pages, P, G, _ = keys.shape
    R = H // G
    padded = q.new_zeros(QUERY_BLOCK, H, C)
    padded[:n] = q
    # (pages, G, QUERY_BLOCK * R, P)
    grouped = padded.mul_(1 / math.sqrt(C)).view(QUERY_BLOCK, G, R, C).transpose(0, 1).reshape(G, QUERY_BLOCK * R, C)
    keys = keys.permute(0, 2, 3, 1).reshape(pages * G, C, P)
    values = values.transpose(1, 2).reshape(pages * G, P, C)
    queries = grouped.repeat(pages, 1, 1)
    scores = torch.bmm(queries, keys).float().view(pages, G, QUERY_BLOCK, R, P)
    if key_scales is not None:
        scores *= key_scales.transpose(1, 2)[:, :, None, None]
    position = first + torch.arange(QUERY_BLOCK).clamp_(max=n - 1)
    key = torch.arange(pages * P).view(pages, 1, P)
    hidden = key > position[:, None]
    scores.masked_fill_(hidden[:, None, :, None], float("-inf"))
    top = scores.amax(dim=(0, 4), keepdim=True)
    p = torch.exp(scores - top)
    sums = p.sum(4).view(pages, G, QUERY_BLOCK * R, 1)
    if value_scales is not None:
        p *= value_scales.transpose(1, 2)[:, :, None, None]
    parts = torch.bmm(p.view(pages * G, QUERY_BLOCK * R, P).to(q.dtype), values).float()
    total, weight = add_in_order(parts.view(pages, G, QUERY_BLOCK * R, C)), add_in_order(sums)
    out = (total / weight).view(G, QUERY_BLOCK, R, C).transpose(0, 1).reshape(QUERY_BLOCK, H, C)
    return out[:n].to(q.dtype)


def add_in_order(parts: Tensor) -> Tensor:
    """Sum over the first axis, left to right: torch.sum groups by length, which would tie the bits to it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
