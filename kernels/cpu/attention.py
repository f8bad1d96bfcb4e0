"""Causal attention over whole rows with few key-value heads: native_attention where that suits, else by blocks.

A block is some queries: the R = H / G heads that share a key head are the rows of one bfloat16 product, whose keys
beyond the block's last query are left out. What is between the products is one pass over the scores.

B rows of T tokens, H query heads, G key-value heads, R = H / G, C channels, I queries in a block, J keys it can see.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cpu import native_attention, unsupported_dtype
from kernels.cpu.passes import passes

BLOCK_ELEMENTS = 1 << 21
"""Scores in one block: 4 MiB of bfloat16, which stay in the caches from one pass to the next."""
QUERY_BLOCK = 128


def unsupported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> str | None:
    return unsupported_dtype(q)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    return attention_forward(q, k, v, documents)[0]


def blocks(B: int, T: int, R: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, queries and visible keys of every block."""
    rows = max(1, BLOCK_ELEMENTS // (R * QUERY_BLOCK * T))
    for first in range(0, B, rows):
        for start in range(0, T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, T)
            yield slice(first, min(first + rows, B)), slice(start, end), slice(0, end)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, C) and the log-sum-exp of every query's scores, float32 (B, T, H)."""
    starts = native_attention.document_starts(q, documents)
    if starts is not None:
        return native_attention.forward(q, k, v, starts)
    B, T, H, C = q.shape
    G, R = k.shape[2], H // k.shape[2]
    documents = only_if_several(documents)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(G, B, T, R, dtype=torch.float32)
    for g in range(G):
        heads = slice(g * R, (g + 1) * R)
        keys, values = k[:, :, g].contiguous(), v[:, :, g].contiguous()
        for b, i, j in blocks(B, T, R):
            queries = q[b, i, heads].reshape(b.stop - b.start, -1, C)  # (rows, I * R, C)
            scores = torch.bmm(queries, keys[b, j].mT)
            passes().softmax(scores, lse[g, b], 1 / math.sqrt(C), i.start, rows_of(documents, b))
            out[b, i, heads] = torch.bmm(scores, values[b, j]).view(b.stop - b.start, -1, R, C)
    return out, lse.permute(1, 2, 0, 3).reshape(B, T, H)


def only_if_several(documents: Tensor | None) -> Tensor | None:
    """None where every row is one document, and causality alone hides keys."""
    if documents is None or bool((documents == documents[:, :1]).all()):
        return None
    return documents.contiguous()


def rows_of(documents: Tensor | None, b: slice) -> Tensor | None:
    return None if documents is None else documents[b]


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4): P is made again from the scores and their sums."""
    starts = native_attention.document_starts(q, documents)
    if starts is not None:
        return native_attention.backward(grad, q, k, v, starts, out, lse)
    B, T, H, C = q.shape
    G, R = k.shape[2], H // k.shape[2]
    documents = only_if_several(documents)
    delta = passes().row_products(grad, out)
    lse, delta = (x.view(B, T, G, R).permute(2, 0, 1, 3).contiguous() for x in (lse, delta))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(B, G, T, C, dtype=torch.float32) for _ in range(2))
    for g in range(G):
        heads = slice(g * R, (g + 1) * R)
        keys, values = k[:, :, g].contiguous(), v[:, :, g].contiguous()
        for b, i, j in blocks(B, T, R):
            shape = (b.stop - b.start, -1, C)  # (rows, I * R, C)
            queries, grad_out = q[b, i, heads].reshape(shape), grad[b, i, heads].reshape(shape)
            p = torch.bmm(queries, keys[b, j].mT)
            grad_s = torch.bmm(grad_out, values[b, j].mT)
            scale = 1 / math.sqrt(C)
            passes().softmax_backward(p, grad_s, lse[g, b], delta[g, b], scale, i.start, rows_of(documents, b))
            grad_v[b, g, j] += torch.bmm(p.mT, grad_out)
            grad_q[b, i, heads] = torch.bmm(grad_s, keys[b, j]).view(b.stop - b.start, -1, R, C)
            grad_k[b, g, j] += torch.bmm(grad_s.mT, queries)
    return grad_q, grad_k.transpose(1, 2).to(k.dtype), grad_v.transpose(1, 2).to(v.dtype)
