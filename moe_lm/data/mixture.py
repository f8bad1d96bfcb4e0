"""Which source each training row comes from.

A source of `epochs` = 4 is read twice as often, token for token, as one of `epochs` = 2: the chance that a row comes
from source s is proportional to epochs_s x tokens_s. Rows are not drawn but dealt out, so that every prefix of the
run holds the mixture as exactly as whole rows can.
"""

from collections.abc import Sequence

import numpy as np

from moe_lm.config import ConfigError, require


def row_shares(epochs: Sequence[float], tokens: Sequence[int | None]) -> list[float]:
    """The share of rows of each source, adding up to 1.

    `tokens` is the size of each source, None for one that is streamed. Where all are streamed the sizes are unknown
    and count as equal: `epochs` then weighs tokens directly. Raises ConfigError where only some are: a number of
    passes over a source without end says nothing beside one with an end.
    """
    streamed = [count is None for count in tokens]
    require(
        all(streamed) or not any(streamed),
        f"{sum(streamed)} of {len(streamed)} data.sources have streaming = true, and a size that is not known cannot "
        "be weighed by epochs against known ones: set streaming alike for all of them.",
    )
    weights = [epoch * (count or 1) for epoch, count in zip(epochs, tokens, strict=True)]
    return [weight / sum(weights) for weight in weights]


class Mixture:
    """Deals rows out to sources: each goes to the one that is furthest behind its share, the first among equals.

    The order depends on nothing but the shares. `counts`, the rows that each source has had, is the whole state.
    """

    def __init__(self, shares: Sequence[float]):
        self.shares = list(shares)
        self.counts = [0] * len(self.shares)

    def take(self, rows: int) -> np.ndarray:
        """(rows,) int64: the source of each of the next rows."""
        chosen = np.zeros(rows, np.int64)
        total = sum(self.counts)
        for row in range(rows):
            total += 1
            behind = [share * total - count for share, count in zip(self.shares, self.counts, strict=True)]
            chosen[row] = source = behind.index(max(behind))
            self.counts[source] += 1
        return chosen

    def load(self, counts: Sequence[int]) -> None:
        """Continue after `counts`. Raises ConfigError where they are of another number of sources."""
        if len(counts) != len(self.shares):
            raise ConfigError(
                f"the saved run has {len(counts)} data.sources and this one {len(self.shares)}: resume with the same."
            )
        self.counts = [int(count) for count in counts]
