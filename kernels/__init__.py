"""The operations of the model, each with a plain definition (`reference`) and fast backends.

Dimension letters of every docstring here: N tokens, D hidden width, F expert width, E experts, K experts per token,
H query heads, G key-value heads, C channels of a head, B rows of T tokens, V vocabulary.

Every operation picks its backend by device, dtype and shape (`registry.explain` says why); `use_backend` fixes it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import registry
from kernels.registry import explain, select, use_backend

__version__ = "0.1.0"
__all__ = [
    "RouterStatistics", "Routing", "attention", "cross_entropy", "expert_mlp", "explain", "gate", "grouped_gemm",
    "paged_attention", "rms_norm", "rope", "rope_append", "route", "router_statistics", "select", "swiglu",
    "use_backend",
]  # fmt: skip


class Routing(NamedTuple):
    """Which experts each token goes to, and the order that puts every expert's tokens side by side.

    A slot is one (token, choice) pair, numbered token * K + choice.
    """

    weights: Tensor
    """(N, K) float32, differentiable; that they sum to 1 depends on how `route` was asked."""
    experts: Tensor
    """(N, K) int64, largest score first, ties to the lowest index; a token's are distinct."""
    order: Tensor
    """(N * K,) int64, slots sorted by expert, in slot order within an expert."""
    offsets: Tensor
    """(E + 1,) int64, expert e owns order[offsets[e] : offsets[e + 1]]."""


class RouterStatistics(NamedTuple):
    """Of the router's distributions over all experts, each the softmax of a token's logits; float32."""

    probability: Tensor
    """(rows, E), every expert's mean over a part of the tokens, differentiable."""
    z: Tensor
    """Mean of (log sum exp logits)^2 (ST-MoE, eq. 5), a differentiable scalar."""
    entropy: Tensor
    """Mean entropy, in nats: 0 to log E."""
    confidence: Tensor
    """Mean of the largest probability: 1 / E to 1."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D,) -> (..., D) in x's dtype; the mean square is taken in float32. With `residual` (..., D) of
    x's dtype it is the norm of their sum, in that dtype, which is returned as well: (normed, x + residual).
    """
    return registry.call("rms_norm", x, weight, eps, residual)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel c with channel c + C / 2 by each token's angle (Su et al. 2021, Hugging Face's channel order).

    x (N, H, C), cos and sin (N, C / 2) float32 -> (N, H, C) in x's dtype.
    """
    return registry.call("rope", x, cos, sin)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the queries and keys of new tokens, and write their keys and values into a paged cache.

    q (n, H, C), k and v (n, G, C), cos and sin (n, C / 2) float32, k_pages and v_pages (pages, P, G, C), slots (n,)
    int64, distinct: token i goes to row slots[i] % P of page slots[i] // P, or nowhere if that is negative -> the
    rotated queries (n, H, C) in q's dtype. No gradient.

    int8 pages take k_scales and v_scales (pages, P, G) float32: a head's scale is its largest magnitude / 127, or 1 if
    that is 0, and its channels are floor(x / scale + 0.5), of x as rounded to k's dtype.
    """
    if (k_pages.dtype == torch.int8) != (k_scales is not None and v_scales is not None):
        raise ValueError(f"rope_append: int8 pages, and no others, take k_scales and v_scales: got {k_pages.dtype}.")
    return registry.call("rope_append", q, k, v, cos, sin, k_pages, v_pages, slots, k_scales, v_scales)


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """A router's logits, summed in float32: rounding them flips choices (Switch Transformer, section 2.4).

    x (N, D), weight (E, D) float32 -> (N, E) float32.
    """
    return registry.call("gate", x, weight)


def route(logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True) -> Routing:
    """Choose `top_k` experts per token and sort the slots by expert. Dropless.

    A token goes to the experts with the largest logits or, with `bias`, the largest softmax(logits) + bias, which
    weighs nothing (Wang et al. 2024, auxiliary-loss-free balancing, eq. 3). The weights of the chosen are the softmax
    over their logits (Mixtral, section 2.1), or theirs in the softmax over all experts if not `normalize` (Switch
    Transformer, section 2.1; OLMoE, section 2).

    logits (N, E) float32, bias (E,) float32 -> Routing. The gradient flows through `weights`, to the logits alone.
    """
    return Routing(*registry.call("route", logits, top_k, bias, normalize))


def router_statistics(logits: Tensor, rows: int = 1) -> RouterStatistics:
    """What a router is charged for and watched by: logits (N, E) float32, N a multiple of `rows`.

    The mean probabilities are those of `rows` equal parts of the tokens, one after the other.
    """
    return RouterStatistics(*registry.call("router_statistics", logits, rows))


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: rows offsets[e]:offsets[e + 1] of x with weight[e] transposed.

    x (M, D), weight (E, F, D), offsets (E + 1,) int64 with offsets[E] = M -> (M, F) in x's dtype.
    """
    return registry.call("grouped_gemm", x, weight, offsets)


def expert_mlp(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send tokens through their experts' SwiGLU MLPs and add the results by router weight (Shazeer 2020; Mixtral).

    x (N, D), gate_up (E, 2F, D) with gate rows before up rows, down (E, D, F) -> (N, D) in x's dtype, to which weights
    of another are rounded. Gradients have the dtype of what they are of.
    """
    args = (x, *routing, gate_up, down)
    if gate_up.dtype != x.dtype and not registry.is_fast("expert_mlp", args):
        args = (x, *routing, gate_up.to(x.dtype), down.to(x.dtype))
    return registry.call("expert_mlp", *args)


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020): hidden (..., 2F), gate channels first -> (..., F)."""
    return registry.call("swiglu", hidden)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal softmax attention inside whole rows, with 1 / sqrt(C) scaling; heads share keys in groups of H / G.

    q (B, T, H, C), k and v (B, T, G, C), documents (B, T) int64 -> (B, T, H, C) in q's dtype. A token sees the
    earlier tokens of its row with the same document number, and itself.
    """
    return registry.call("attention", q, k, v, documents)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of new tokens against a paged cache that already holds their keys (Kwon et al. 2023).

    Sequence s brings the queries q[query_offsets[s] : query_offsets[s + 1]], its last ones of `lengths[s]` tokens;
    its token t lies in page page_table[s, t // P] at row t % P.

    q (N, H, C), k_pages and v_pages (pages, P, G, C), page_table (S, pages per sequence) int64, query_offsets
    (S + 1,) int64, lengths (S,) int64 -> (N, H, C) in q's dtype. No gradient. A query's result depends on its own
    sequence alone: neither batch-mates nor the number of queries beside it change a bit of it.

    Pages of int8 come with k_scales and v_scales (pages, P, G) float32, by which each token's head is multiplied.
    """
    return registry.call("paged_attention", q, k_pages, v_pages, page_table, query_offsets, lengths, k_scales, v_scales)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(x @ weight^T)[target] in nats, over the rows whose target is not negative.

    x (N, D), weight (V, D), targets (N,) int64 -> float32 scalar. Logits exist only a chunk of rows at a time.
    """
    return registry.call("cross_entropy", x, weight, targets)
