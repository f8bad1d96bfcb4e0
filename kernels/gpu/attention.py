"""Causal attention over whole rows by torch's own kernels, which read a key head once for all its query heads.

Without documents it is torch's scaled_dot_product_attention, whose CUDA choices for bfloat16 and float16 (cuDNN on
H100, else FlashAttention 2; Dao 2023) take grouped heads as they are. FlashAttention writes its dK and dV per query
head, though, before it adds them up, and dQ has a fixed order only under torch.use_deterministic_algorithms. In
float32 torch may expand keys and values. With documents it is FlexAttention (Dong et al. 2024), compiled on first use,
which skips the blocks of keys that no query of a block can see. Autograd sees through both.

B rows of T tokens, H query heads, G key-value heads, C channels of a head.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.gpu import unsupported_dtype

PLAIN = True
"""Whether autograd and compilers see through this module, as through the reference."""

BLOCK = 128
"""Queries and keys in a block of FlexAttention's masks."""
MAX_CHANNELS = 256
"""Widest head of torch's fused kernels; a wider one would silently be attended to in T x T matrices."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> str | None:
    if q.shape[3] > MAX_CHANNELS:
        return f"has heads of up to {MAX_CHANNELS} channels, not {q.shape[3]}"
    return unsupported_dtype(q)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if documents is None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        attend = fused() if q.is_cuda and not torch.compiler.is_compiling() else within_documents
        out = attend(q, k, v, documents)
    return out.transpose(1, 2)


@cache
def fused() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(within_documents, fullgraph=True)


def within_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """q (B, H, T, C), k and v (B, G, T, C), documents (B, T) int64 -> (B, H, T, C)."""
    return flex_attention(q, k, v, block_mask=block_mask(documents), enable_gqa=True)


def block_mask(documents: Tensor) -> BlockMask:
    """Which blocks of keys j a block of queries i sees, in part or in full, by the blocks' lowest and highest document.

    Where a row's numbers only grow these are the lists of torch's create_block_mask, which makes the T x T mask of
    every row first; else a part may turn out to be empty.
    """
    T = documents.shape[1]
    blocks = -(-T // BLOCK)
    # A block that T cuts short is filled up with its last token, and never full.
    token = torch.arange(blocks * BLOCK, device=documents.device).clamp(max=T - 1)
    low, high = documents[:, token].unflatten(1, (blocks, BLOCK)).aminmax(dim=2)
    low_i, high_i, low_j, high_j = low[:, :, None], high[:, :, None], low[:, None], high[:, None]
    i = torch.arange(blocks, device=documents.device)[:, None]
    full = (low_i == high_j) & (high_i == low_j) & (i > i.T) & (i < T // BLOCK)
    part = (low_i <= high_j) & (low_j <= high_i) & (i >= i.T) & ~full

    def visible(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[b, i] == documents[b, j])

    return BlockMask.from_kv_blocks(
        *listed(part), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(T, T)
    )  # fmt: skip


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool (B, i, j) as the number of j that every i has chosen, int32 (B, 1, i), and all j, the chosen first."""
    number = chosen.sum(2, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
    return number[:, None], order[:, None]
