"""Prompt lookup: guess that what followed the last tokens earlier will follow them again (Saxena 2023)."""


class PromptLookup:
    """An index over one sequence's tokens: for every n-gram, where it ended last.

    Tokens are added once each and removed again by `truncate`, so the cost of a step does not grow with the length.
    """

    def __init__(self, min_n: int = 2, max_n: int = 4):
        assert 1 <= min_n <= max_n
        self.min_n, self.max_n = min_n, max_n
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        """For each n-gram that another token follows: the index after its latest occurrence."""
        self.replaced: list[list[int | None]] = []
        """For each token but the first: what `ends` held for the n-grams before it, shortest first, to take it back."""

    def propose(self, tokens: list[int], k: int) -> list[int]:
        """Up to k tokens that followed the latest earlier occurrence of the longest suffix of `tokens` that has one.

        `tokens` is the whole sequence. It may have grown since the last call; after it was cut, call `truncate` first.
        The result is empty where no suffix of min_n to max_n tokens occurs earlier.
        """
        self.extend(tokens)
        length = len(tokens)
        for n in range(min(self.max_n, length - 1), self.min_n - 1, -1):
            start = self.ends.get(tuple(tokens[length - n :]))
            if start is not None:
                guess = tokens[start : start + k]
                # A match that overlaps the end is a repetition, which goes on: its period is what it has.
                while len(guess) < k:
                    guess += guess[: k - len(guess)]
                return guess
        return []

    def extend(self, tokens: list[int]) -> None:
        """Index what `tokens`, the whole sequence, has beyond what is indexed."""
        assert len(tokens) >= len(self.tokens), "the sequence was cut without truncate"
        for end in range(len(self.tokens), len(tokens)):
            # The n-grams before a token are indexed with it: one without a successor has nothing to propose.
            if end:
                before = []
                for n in range(self.min_n, min(self.max_n, end) + 1):
                    gram = tuple(tokens[end - n : end])
                    before.append(self.ends.get(gram))
                    self.ends[gram] = end
                self.replaced.append(before)
            self.tokens.append(tokens[end])

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for end in range(len(self.tokens) - 1, max(length, 1) - 1, -1):
            for n, earlier in enumerate(self.replaced.pop(), self.min_n):
                gram = tuple(self.tokens[end - n : end])
                if earlier is None:
                    del self.ends[gram]
                else:
                    self.ends[gram] = earlier
        del self.tokens[length:]
