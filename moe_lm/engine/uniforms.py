"""Random numbers by place instead of by turn: what is drawn depends on the seed, the sample and the token's position.

A generator that hands out one number after another gives a request other numbers when its batch-mates change, when a
draft is rejected or when it is computed a second time after preemption. Here each number is a hash of where it is
used, as in counter-based generators (Salmon et al. 2011): SplitMix64 (Steele et al. 2014), whose state is a counter,
with a start that is hashed from the seed, the sample and the purpose.
"""

from functools import lru_cache

import numpy as np

SAMPLE, ACCEPT, RESIDUAL = 0, 1, 2
"""Purposes in the target: a token drawn plainly, whether a guess stands, what replaces one that does not."""
DRAFT, DRAFT_ACCEPT, DRAFT_RESIDUAL = 3, 4, 5
"""The same three in the draft model, which may itself be helped by guesses."""

NOISE = 6
"""A number for every token of the vocabulary, the same in target and draft model."""

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: SplitMix64's step from one counter to the next."""
MASK = 2**64 - 1


def uniform(seed: int, sample: int, position: int, purpose: int) -> float:
    """A number in [0, 1), a multiple of 2^-53.

    `sample` is the index among the request's n samples, `position` that of the token in the list of all tokens, prompt
    included, `purpose` one of the constants above. The four are integers from 0 to 2^63 - 1.
    """
    return (mix(stream(seed, sample, purpose) + (position + 1) * GOLDEN) >> 11) * 2.0**-53


@lru_cache(maxsize=4096)
def stream(seed: int, sample: int, purpose: int) -> int:
    """Where the numbers of one sample and purpose start, 64 bits. Cached: a step asks for the same few."""
    state = 0
    for value in (seed, sample, purpose):
        state = mix((state ^ value) + GOLDEN)
    return state


def mix(x: int) -> int:
    """SplitMix64's finaliser, a bijection of 64 bits in which each bit in flips each bit out half of the time."""
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def gumbels(seed: int, sample: int, position: int, count: int) -> np.ndarray:
    """Independent numbers of the standard Gumbel distribution for tokens 0 to count - 1 at one position, float64."""
    start = mix(stream(seed, sample, NOISE) + (position + 1) * GOLDEN)
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return -np.log(-np.log(((x >> np.uint64(11)) + 0.5) * 2.0**-53))
