"""Figures of routing, from counts alone. E experts, K experts per token, N tokens, C kinds of token."""

import math

import numpy as np

from moe_lm.scaling.routing import expected_distinct

WINDOWS = range(1, 9)
"""Tokens in a row whose distinct experts are counted: a step of speculation verifies as many."""


def relative_load(counts: np.ndarray) -> np.ndarray:
    """Tokens of each expert, (..., E), as a multiple of the mean over the experts; 0 where there are none."""
    mean = counts.mean(-1, keepdims=True)
    return np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)


def lift(table: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """How much oftener each row of (C, E) counts goes to an expert than all rows together do; 1 where nothing is known.

    P(e | c) / P(e). `base` (E,) are the counts that P(e) is taken from, those of the table if not given.
    """
    base = table.sum(0) if base is None else base
    rows = table.sum(1, keepdims=True)
    expected = rows * (base / max(1, base.sum()))
    return np.divide(table, expected, out=np.ones(table.shape), where=expected > 0)


def information(table: np.ndarray) -> float:
    """Share of the entropy of the expert that the row of a (C, E) table of counts tells: I(c; e) / H(e), 0 to 1.

    Less the (rows - 1)(columns - 1) / 2n nats that n independent draws would show on average (Miller 1955), down to 0.
    """
    total = table.sum()
    if not total:
        return 0.0
    rows, columns = table.sum(1), table.sum(0)
    inside = table > 0
    expected = np.outer(rows, columns) / total
    mutual = float((table[inside] * np.log(table[inside] / expected[inside])).sum() / total)
    shares = columns[columns > 0] / total
    entropy = float(-(shares * np.log(shares)).sum())
    by_chance = ((rows > 0).sum() - 1) * ((columns > 0).sum() - 1) / (2 * total)
    return max(0.0, mutual - float(by_chance)) / entropy if entropy > 0 else 0.0


def independent_pairs(counts: np.ndarray, top_k: int) -> np.ndarray:
    """Tokens that would choose both experts of each pair (E, E), if pairs formed by the experts' own counts alone.

    A token's K experts differ, so that the product of two shares is too much by far where E is small: it is 1.9 times
    what tokens with 16 equal experts and K = 2 can show. Instead the expectation is a_i a_j off the diagonal and
    nothing on it, with a such that every expert keeps its count, sum_j a_i a_j = (K - 1) n_i: quasi-independence
    (Goodman 1968). Zero for K = 1.
    """
    margins = counts * (top_k - 1.0)
    if not margins.any():
        return np.zeros((len(counts), len(counts)))
    scale = margins / math.sqrt(margins.sum())
    for _ in range(1000):
        reached = scale * (scale.sum() - scale)
        # The root of the correction, because both factors of a cell are moved by it.
        scale *= np.sqrt(np.divide(margins, reached, out=np.zeros(len(counts)), where=reached > 0))
        if np.abs(reached - margins).max() < 1e-6 * margins.max():
            break
    pairs = np.outer(scale, scale)
    np.fill_diagonal(pairs, 0.0)
    return pairs


def pair_ratio(pairs: np.ndarray, top_k: int) -> np.ndarray:
    """Co-choices (E, E) by those expected of independence; 1 on the diagonal and where none are expected.

    `pairs` holds on its diagonal how many tokens chose each expert.
    """
    expected = independent_pairs(pairs.diagonal(), top_k)
    return np.divide(pairs, expected, out=np.ones(pairs.shape), where=expected > 0)


def distinct_if_independent(counts: np.ndarray, tokens: int) -> list[float]:
    """Experts that windows of 1 to 8 tokens would choose, if tokens chose independently, each expert as often as here.

    `counts` (E,) are of N = `tokens` tokens. More than in truth means that neighbours agree.
    """
    chance = counts / tokens
    return [float((1 - (1 - chance) ** window).sum()) for window in WINDOWS]


def distinct_if_uniform(experts: int, top_k: int) -> list[float]:
    """The same if every expert were as likely: E (1 - (1 - K / E)^T)."""
    return [expected_distinct(experts, top_k, window) for window in WINDOWS]


def again_if_independent(counts: np.ndarray, tokens: int, top_k: int) -> float:
    """Share of a token's experts that the next one would choose again, if tokens chose independently."""
    return float(((counts / tokens) ** 2).sum()) / top_k
