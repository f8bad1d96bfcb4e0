"""Causal self-attention; the number of key-value heads makes it multi-head, grouped or multi-query."""

from collections.abc import Callable

from torch import Tensor, nn

import kernels
from moe_lm.config import ModelConfig
from moe_lm.model.layers import Linear

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q, k, v) -> (..., H, C): how new queries (..., H, C) meet the keys and values (..., G, C) that come
with them and those of the past. `whole_rows` when training, a cache when serving."""


def whole_rows(documents: Tensor | None = None) -> Attend:
    """Attention inside (B, T) rows, each token with the earlier ones of its document, documents (B, T) int64."""
    return lambda layer, q, k, v: kernels.attention(q, k, v, documents)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        # One matrix for queries, keys and values: with one key head, its own GEMMs would be 32 columns wide.
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (..., D) -> (..., D), rotation: cosines and sines of the flattened positions."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        qk = kernels.rope(qk.flatten(0, -3), *rotation).view(qk.shape)
        q, k = qk.split([heads, kv_heads], dim=-2)
        return self.o_proj(attend(self.layer, q, k, v).flatten(-2))
