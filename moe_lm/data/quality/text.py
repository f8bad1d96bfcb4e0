"""What the rules measure of a document: words, lines, repeated n-grams, runs of encoded data. Each computed once.

W words, n of them in an n-gram.
"""

import re
from functools import cached_property

import numpy as np

LONGEST_NGRAM = 10
BULLETS = ("•", "‣", "▪", "◦", "●", "- ", "* ")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Gopher's (Rae et al. 2021, appendix A.1.1)."""
GENERATED = re.compile(
    r"(?i)auto[- ]?generated|automatically generated|generated (?:by|from|automatically)|do not edit"
)
ENCODED = (
    re.compile(r"[A-Za-z0-9+/\n=]{64,}"),
    re.compile(r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}"),
    re.compile(r"(?:\\u[0-9a-fA-F]{4}){8,}"),
)
"""Base64, hexadecimal bytes and Unicode escapes, as StarCoder2 finds them (Lozhkov et al. 2024, section 4.1)."""


class Text:
    """A document as the rules see it. Characters of words are counted without the white space between them."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without the white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, re.split(r"\n[ \t]*\n", self.text)) if part]

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """(W,) int64: characters of each word."""
        return np.array([len(word) for word in self.words], np.int64)

    @cached_property
    def ngrams(self) -> list[np.ndarray]:
        """For n from 1 to LONGEST_NGRAM: (W - n + 1,) int64, a number for each n-gram, the same for the same words.

        The numbers of n-grams come of pairs of a shorter one's number and a word's, so they are exact, not hashes.
        """
        known: dict[str, int] = {}
        ones = np.array([known.setdefault(word, len(known)) for word in self.words], np.int64)
        found = [ones]
        for n in range(2, LONGEST_NGRAM + 1):
            if len(ones) < n:
                found.append(np.zeros(0, np.int64))
                continue
            pairs = found[-1][:-1] * len(known) + ones[n - 1 :]
            found.append(np.unique(pairs, return_inverse=True)[1].astype(np.int64))
        return found

    def top_ngram_share(self, n: int) -> float:
        """Share of the characters in the most frequent n-gram; 0 where none is there twice."""
        numbers = self.ngrams[n - 1]
        if not len(numbers):
            return 0.0
        _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        characters = np.convolve(self.word_lengths, np.ones(n, np.int64), "valid")
        most = counts.max()
        best = characters[first[counts == most]].max()
        return float(most * best / self.word_lengths.sum()) if most > 1 else 0.0

    def duplicate_ngram_share(self, n: int) -> float:
        """Share of the characters in n-grams that stood before in the document, each character counted once."""
        numbers = self.ngrams[n - 1]
        if not len(numbers):
            return 0.0
        again = np.ones(len(numbers), bool)
        again[np.unique(numbers, return_index=True)[1]] = False
        covered = np.convolve(again, np.ones(n, np.int64)) > 0
        return float(self.word_lengths[covered].sum() / self.word_lengths.sum())

    @cached_property
    def encoded_runs(self) -> list[int]:
        """Lengths in characters of the runs of encoded data."""
        return [found.end() - found.start() for pattern in ENCODED for found in pattern.finditer(self.text)]


def repeated(parts: list[str]) -> tuple[float, float]:
    """Share of the parts that stood before, and of their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return share(count, len(parts)), share(characters, sum(map(len, parts)))


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def sentences(text: str) -> int:
    """Sentences, by the marks that end them before white space or the end."""
    return len(re.findall(r"[.!?][\"')\]]*(?:\s|$)", text))
