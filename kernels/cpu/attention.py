"""Causal attention over whole rows with few key-value heads.

The forward is torch's flash kernel. The backward is ours: torch's CPU flash backward multiplies in float32 and one key
head per query head, here 4 times slower; ours packs the R = H / G query heads that share a key head into the rows of
one bfloat16 GEMM and skips the key blocks that causality hides.

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
    R = q.shape[2] // k.shape[2]
    heads_first = q.transpose(1, 2)
    k, v = (t.transpose(1, 2)[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2) for t in (k, v))
    mask = None if documents is None else causal_bias(documents, q.dtype)[:, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        heads_first, k, v, 0.0, documents is None, attn_mask=mask
    )
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def causal_bias(documents: Tensor | None, dtype: torch.dtype, length: int = 0) -> Tensor:
    """0 where query i may see key j and -inf elsewhere: (B, T, T), or (1, T, T) without documents."""
    T = length if documents is None else documents.shape[1]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)[None]
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4): P is made again from the scores and their sums."""
    B, T, _, C = q.shape
    G, R = k.shape[2], q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(C)
    grad = grad.contiguous()
    delta = (grad * out).sum(3, dtype=torch.float32).to(q.dtype)
    bias = causal_bias(documents, q.dtype, T)
    lse = lse.to(torch.float32)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(B, G, T, C, dtype=torch.float32) for _ in range(2))
    rows_per_block = max(1, BLOCK_ELEMENTS // (R * QUERY_BLOCK * T))
    for g in range(G):
        heads = slice(g * R, (g + 1) * R)
        keys, values = k[:, :, g].contiguous(), v[:, :, g].contiguous()
        for first in range(0, B, rows_per_block):
            b = slice(first, min(first + rows_per_block, B))
            n = b.stop - b.start
            for start in range(0, T, QUERY_BLOCK):
                i = slice(start, min(start + QUERY_BLOCK, T))
                rows = (i.stop - i.start) * R
                j = slice(0, i.stop)
                q_block = (q[b, i, heads] * scale).reshape(n, rows, C)
                grad_block = grad[b, i, heads].reshape(n, rows, C)
                scores = torch.bmm(q_block, keys[b, j].transpose(1, 2)).view(n, -1, R, i.stop)
                scores += bias[b if len(bias) > 1 else slice(0, 1), i, j][:, :, None]
                scores -= lse[b, i, heads, None].to(scores.dtype)
                p = scores.exp_().view(n, rows, i.stop)
                grad_v[b, g, j] += torch.bmm(p.transpose(1, 2), grad_block)
                grad_p = torch.bmm(grad_block, values[b, j].transpose(1, 2))
                grad_p.sub_(delta[b, i, heads].reshape(n, rows, 1)).mul_(p)
                grad_q[b, i, heads] = torch.bmm(grad_p, keys[b, j]).mul_(scale).view(n, -1, R, C)
                grad_k[b, g, j] += torch.bmm(grad_p.transpose(1, 2), q_block)
    return grad_q, grad_k.transpose(1, 2).to(k.dtype), grad_v.transpose(1, 2).to(v.dtype)
