"""Causal self-attention; the number of key-value heads makes it multi-head, grouped or multi-query."""

from collections.abc import Callable

from torch import Tensor, nn

import kernels
from moe_lm.config import ModelConfig
from moe_lm.model.layers import Linear

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the flattened positions, float32 (N, C / 2) each."""

Attend = Callable[[int, Tensor, Tensor, Tensor, Rotation], Tensor]
"""attend(layer, q, k, v, rotation) -> (..., H, C): how new queries (..., H, C) meet the keys and values (..., G, C)
that come with them and those of the past. `whole_rows` when training, a cache when serving. Queries and keys come
unturned, because turning them and writing a cache are one kernel."""


def whole_rows(documents: Tensor | None = None) -> Attend:
    """Attention inside (B, T) rows, each token with the earlier ones of its document, documents (B, T) int64."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        q, k = (kernels.rope(x.flatten(0, -3), *rotation).view(x.shape) for x in (q, k))
        return kernels.attention(q, k, v, documents)

    return attend


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

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """x (..., D) -> (..., D)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return self.o_proj(attend(self.layer, q, k, v, rotation).flatten(-2))
