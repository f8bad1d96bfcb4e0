"""Causal attention over whole rows by torch's own kernels, which read a key head once for all its query heads.

Without documents it is torch's scaled_dot_product_attention, whose CUDA choices for bfloat16 and float16 (cuDNN on
H100, else FlashAttention 2; Dao 2023) take grouped heads as they are. FlashAttention writes its dK and dV per query
head, though, before it adds them up, and dQ has a fixed order only under torch.use_deterministic_algorithms. In
float32 torch may expand keys and values. With documents it is FlexAttention (Dong et al. 2024), compiled on first use,
which skips the blocks of keys that no query of a block can see. Autograd sees through both; a compiler that traces the
first one breaks its graph at the second one's mask.

B rows of T tokens, H query heads, G key-value heads, C channels of a head.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.gpu import unsupported_dtype

PLAIN = True
"""Whether autograd and compilers see through this module, as through the reference."""

BLOCK = 128
"""Queries and keys in a block of FlexAttention's masks."""
LEAST_CHANNELS, MAX_CHANNELS = 16, 256
"""Narrowest head of FlexAttention when compiled, to which others are filled up, and widest of torch's fused kernels; a
wider one would silently be attended to in T x T matrices."""

MOST_COMPILED = 64
"""Kernels for as many shapes; torch's own limit of 8 is met by training two models and evaluating both."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> str | None:
    if q.shape[3] > MAX_CHANNELS:
        return f"has heads of up to {MAX_CHANNELS} channels, not {q.shape[3]}"
    return unsupported_dtype(q)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if documents is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    C = q.shape[3]
    if C < LEAST_CHANNELS:
        q, k, v = (functional.pad(x, (0, LEAST_CHANNELS - C)) for x in (q, k, v))
    attend = fused if q.is_cuda and not torch.compiler.is_compiling() else masked
    return attend(q, k, v, documents_mask(documents), C**-0.5)[..., :C].transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """q (B, H, T, C), k and v (B, G, T, C) -> (B, H, T, C)."""
    # The kernel for rows of fewer than 128 tokens has no tile for some heads (4 of 60 on 1; torch 2.11).
    options = {"BACKEND": "TRITON"}
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """`masked`, compiled for each shape, dtype and whether gradients are wanted."""
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
        return compiled()(q, k, v, mask, scale)


@cache
def compiled() -> Callable[[Tensor, Tensor, Tensor, BlockMask, float], Tensor]:
    # Fixed shapes, the one way that was tried on a GPU: rows have one length in training.
    return torch.compile(masked, fullgraph=True, dynamic=False)


@torch.compiler.disable
def documents_mask(documents: Tensor) -> BlockMask:
    """`block_mask` of the newest documents, kept for all layers.

    Never part of a compiled graph: there the kernel finds a row's lists by strides of the heads' axis, of one, that are
    not what a view says they are, and takes the first row's lists for every row (torch 2.11).
    """
    if documents.is_inference():
        return block_mask(documents)
    return newest_mask(documents, documents._version)


@lru_cache(maxsize=1)
def newest_mask(documents: Tensor, version: int) -> BlockMask:
    """By the tensor itself, not by what is in it: hence its version."""
    # A backward pass may need what an evaluation made first.
    with torch.inference_mode(False), torch.no_grad():
        return block_mask(documents)


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
