"""The paged key-value cache of one sequence.

L layers, P tokens per page, G key-value heads, C channels of a head, n new tokens.
"""

import torch
from torch import Tensor

import kernels
from moe_lm.config import ModelConfig
from moe_lm.model.attention import Attend, Rotation

PAGE_SIZE = 64


class KVCache:
    """Keys and values of up to `capacity` tokens. `length` tokens are valid; what lies beyond is never read."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device):
        pages = -(-capacity // PAGE_SIZE)
        shape = (config.num_hidden_layers, pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.page_table = torch.arange(pages, device=device)[None]
        self.capacity = pages * PAGE_SIZE
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as a rejected draft is forgotten."""
        assert length <= self.length, f"cannot keep {length} tokens of {self.length}"
        self.length = length

    def extend(self, n: int, rows: int) -> tuple[Tensor, Attend]:
        """Room for n more tokens: their positions (rows,) int64, and the attention of a forward pass over them.

        The pass has rows >= n rows; those beyond n repeat the last token and leave no trace in the cache.
        """
        start, end = self.length, self.length + n
        assert end <= self.capacity, f"{end} tokens do not fit a cache of {self.capacity}"
        device = self.keys.device
        new = torch.arange(start, end, device=device)
        slots = self.page_table[0, new // PAGE_SIZE] * PAGE_SIZE + new % PAGE_SIZE
        slots = torch.nn.functional.pad(slots, (0, rows - n), value=-1)
        offsets, lengths = torch.tensor([0, n], device=device), torch.tensor([end], device=device)
        self.length = end

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            q = kernels.rope_append(q, k, v, *rotation, keys, values, slots)
            out = kernels.paged_attention(q[:n], keys, values, self.page_table, offsets, lengths)
            return out if rows == n else torch.cat([out, out[-1:].expand(rows - n, -1, -1)])

        return new if rows == n else torch.cat([new, new[-1:].expand(rows - n)]), attend
