"""A model with the cache of one sequence: tokens in, logits out."""

import torch
from torch import Tensor

from moe_lm.engine.cache import KVCache
from moe_lm.model import Transformer

ROWS = 8
"""Tokens whose logits are wanted go through the model in passes of this many rows, short ones filled up: one new token
and a draft to verify then meet matrix products of one shape, which give a token's float32 logits the same bits."""
PREFILL_ROWS = 256
"""Rows in one pass over a prompt, of which only the last token's logits are wanted."""


class Runner:
    """Feeds one sequence to a model. `length` tokens are in the cache.

    Passes whose logits are wanted are of multiples of `rows` tokens. A draft takes 1: which bits its logits have
    changes what it proposes, never what is accepted as the target's.
    """

    def __init__(self, model: Transformer, capacity: int, rows: int = ROWS):
        self.model, self.rows = model, rows
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
        most = PREFILL_ROWS if last == 1 else self.rows
        logits = []
        for start in range(0, len(tokens), most):
            part = tokens[start : start + most]
            wanted = len(part) - max(0, len(tokens) - last - start)
            states = self.step(part)
            if wanted > 0:
                # Whole blocks of rows here too: the projection must not see a shape that depends on `last`.
                first = len(part) - wanted
                block = first // self.rows * self.rows
                logits.append(self.model.logits(states[block:])[first - block : len(part) - block])
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def step(self, tokens: list[int]) -> Tensor:
        """One forward pass: normed states (rows, D), the first len(tokens) of them meaningful."""
        rows = -(-len(tokens) // self.rows) * self.rows
        positions, attend = self.cache.extend(len(tokens), rows)
        padded = torch.tensor(tokens + tokens[-1:] * (rows - len(tokens)), device=self.device)
        return self.model.hidden_states(padded, positions, attend)[0]
