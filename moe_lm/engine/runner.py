"""A model with the cache of one sequence: tokens in, logits out."""

import torch
from torch import Tensor

from moe_lm.engine.cache import KVCache
from moe_lm.model import Transformer

ROWS = 8
"""Every forward pass has a multiple of this many rows, so that one new token and a draft of up to 8 go through matrix
products of one shape: on a CPU a token's float32 logits then have the same bits either way."""
PREFILL_ROWS = 256
"""Most tokens in one forward pass."""


class Runner:
    """Feeds one sequence to a model. `length` tokens are in the cache."""

    def __init__(self, model: Transformer, capacity: int):
        self.model = model
        weight = model.embed_tokens
        self.device = weight.device
        dtype = model.compute_dtype or weight.dtype
        self.cache = KVCache(model.config, capacity, dtype, self.device)

    @property
    def length(self) -> int:
        return self.cache.length

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    @torch.inference_mode()
    def forward(self, tokens: list[int], last: int = 1) -> Tensor:
        """Append tokens; logits float32 (last, V) after each of the final `last` of them."""
        assert 1 <= last <= len(tokens)
        start = 0
        while len(tokens) - start > PREFILL_ROWS:
            # The final pass must hold all rows whose logits are wanted.
            end = min(start + PREFILL_ROWS, len(tokens) - last)
            self.step(tokens[start:end])
            start = end
        n = len(tokens) - start
        return self.model.logits(self.step(tokens[start:])[n - last : n])

    def step(self, tokens: list[int]) -> Tensor:
        """One forward pass: normed states (rows, D), the first len(tokens) of them meaningful."""
        rows = -(-len(tokens) // ROWS) * ROWS
        positions, attend = self.cache.extend(len(tokens), rows)
        padded = torch.tensor(tokens + tokens[-1:] * (rows - len(tokens)), device=self.device)
        return self.model.hidden_states(padded, positions, attend)[0]
