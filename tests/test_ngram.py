"""Prompt lookup against a search through the whole sequence."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.engine.ngram import PromptLookup


def searched(tokens: list[int], k: int, min_n: int, max_n: int) -> list[int]:
    """The definition: the longest suffix first, then the latest place before the end where it stands."""
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if n <= len(tokens) and tokens[start : start + n] == tokens[len(tokens) - n :]:
                follows, guess = list(tokens), []
                for i in range(k):
                    guess.append(follows[start + n + i])
                    follows.append(guess[-1])
                return guess
    return []


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.sampled_from([(1, 1), (1, 3), (2, 4), (3, 3)]),
    changes=st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 2), max_size=8)), max_size=12),
    k=st.integers(0, 9),
)
def test_growing_and_cut_sequences(sizes, changes, k):
    lookup, tokens = PromptLookup(*sizes), []
    for cut, new in changes:
        length = max(0, len(tokens) - cut)
        lookup.truncate(length)
        del tokens[length:]
        tokens += new
        assert lookup.propose(tokens, k) == searched(tokens, k, *sizes)
    fresh = PromptLookup(*sizes)
    fresh.extend(tokens)
    lookup.extend(tokens)
    assert (lookup.tokens, lookup.ends, lookup.replaced) == (fresh.tokens, fresh.ends, fresh.replaced)


def test_the_latest_and_the_longest_count():
    lookup = PromptLookup()
    assert lookup.propose([], 4) == []
    assert lookup.propose([1, 2], 4) == []
    assert lookup.propose([1, 2, 9, 1, 2, 8, 1, 2], 2) == [8, 1]
    longest = PromptLookup()
    assert longest.propose([5, 1, 2, 9, 6, 1, 2, 8, 5, 1, 2], 1) == [9]


def test_a_repetition_goes_on():
    assert PromptLookup().propose([7, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_a_step_does_not_read_the_sequence_again():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    tokens = Counted(random.Random(0).choices(range(50), k=5000))
    lookup = PromptLookup()
    lookup.propose(tokens, 4)
    Counted.reads = 0
    for token in range(100):
        tokens.append(token)
        lookup.propose(tokens, 4)
    assert Counted.reads <= 100 * 12
