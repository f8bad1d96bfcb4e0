"""Causal attention over whole rows with few key-value heads.

The forward is torch's flash kernel, the backward ours: both took 13 ms where torch's two took 22 (2,048 tokens in 4
heads of 64 on one key head), and 79 ms for 144 (8,192 tokens in 8 heads of 32; 2 cores, medians of alternated runs).
The backward packs the R = H / G query heads that share a key head into the rows of one bfloat16 GEMM and skips the key
blocks that causality hides.

B rows of T tokens, H query heads, G key-value heads, R = H / G, C channels, I queries in a block, J keys it can see.
"""

import math

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype

BLOCK_ELEMENTS = 1 << 19
"""Scores in one block: 1 MiB of bfloat16, so that the passes over it stay in the second-level caches."""
QUERY_BLOCK = 64


def unsupported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> str | None:
    return unsupported_dtype(q)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    return attention_forward(q, k, v, documents)[0]


def attention_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, C) and the log-sum-exp of every query's scores, float32 (B, T, H)."""
    mixed = rows_of_several(documents)
    if not len(mixed):
        return flash(q, k, v, None)
    # Rows within one document, nearly all where documents are long, need no mask, and causality halves their work.
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    plain = torch.ones(len(q), dtype=torch.bool).index_fill_(0, mixed, False).nonzero().squeeze(1)
    for rows, chosen in ((plain, None), (mixed, documents[mixed])):
        if len(rows):
            out[rows], lse[rows] = flash(q[rows], k[rows], v[rows], chosen)
    return out, lse


def rows_of_several(documents: Tensor | None) -> Tensor:
    """Numbers of the rows that hold more than one document, int64."""
    if documents is None:
        return torch.empty(0, dtype=torch.int64)
    return (documents != documents[:, :1]).any(1).nonzero().squeeze(1)


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    R = q.shape[2] // k.shape[2]
    k, v = (t.transpose(1, 2)[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2) for t in (k, v))
    mask = None
    if documents is not None:
        T = documents.shape[1]
        hidden = hidden_keys(documents, slice(0, T), slice(0, T))
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[:, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k, v, 0.0, documents is None, attn_mask=mask
    )
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def hidden_keys(documents: Tensor, i: slice, j: slice) -> Tensor:
    """Which keys j the queries i may not see, bool (B, I, J)."""
    later = torch.arange(j.start, j.stop) > torch.arange(i.start, i.stop)[:, None]
    return later | (documents[:, i, None] != documents[:, None, j])


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4): P is made again from the scores and their sums."""
    B, T, H, C = q.shape
    G, R = k.shape[2], H // k.shape[2]
    scale = 1 / math.sqrt(C)
    delta = (grad * out).sum(3, dtype=torch.float32).to(q.dtype)
    several = torch.zeros(B, dtype=torch.bool).index_fill_(0, rows_of_several(documents), True).tolist()
    later = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q.dtype).triu_(1)[:, None]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(B, G, T, C, dtype=torch.float32) for _ in range(2))
    rows_per_block = max(1, BLOCK_ELEMENTS // (R * QUERY_BLOCK * T))
    for g in range(G):
        heads = slice(g * R, (g + 1) * R)
        keys, values = k[:, :, g].contiguous(), v[:, :, g].contiguous()
        for first in range(0, B, rows_per_block):
            b = slice(first, min(first + rows_per_block, B))
            for start in range(0, T, QUERY_BLOCK):
                i = slice(start, min(start + QUERY_BLOCK, T))
                j = slice(0, i.stop)
                queries, shape = i.stop - i.start, (b.stop - b.start, -1, C)
                q_block = (q[b, i, heads] * scale).reshape(shape)  # (rows, I * R, C)
                grad_block = grad[b, i, heads].reshape(shape)
                p = torch.bmm(q_block, keys[b, j].transpose(1, 2))  # (rows, I * R, J)
                scores = p.view(len(p), queries, R, i.stop)
                scores[..., i] += later[:queries, :, :queries]
                if any(several[b]):
                    scores.masked_fill_(hidden_keys(documents[b], i, j)[:, :, None], float("-inf"))
                scores.sub_(lse[b, i, heads, None].to(p.dtype)).exp_()
                grad_v[b, g, j] += torch.bmm(p.transpose(1, 2), grad_block)
                grad_p = torch.bmm(grad_block, values[b, j].transpose(1, 2))
                grad_p.sub_(delta[b, i, heads].reshape(len(p), -1, 1)).mul_(p)
                grad_q[b, i, heads] = torch.bmm(grad_p, keys[b, j]).mul_(scale).view(len(p), queries, R, C)
                grad_k[b, g, j] += torch.bmm(grad_p.transpose(1, 2), q_block)
    return grad_q, grad_k.transpose(1, 2).to(k.dtype), grad_v.transpose(1, 2).to(v.dtype)
