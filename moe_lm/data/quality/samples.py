"""What a cleaning tells of itself: counts by rule, a few documents of each, pairs, scores. All of bounded size."""

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_lm.data.sources import hash_share

EXCERPT = 200
"""Characters of a document that a sample shows."""
BEFORE = 40
"""Characters that a pair's excerpts begin before the first difference."""
BINS = 20


@dataclass
class Removed:
    """What one rule removed from one source."""

    step: str
    rule: str
    above: bool
    limit: float
    documents: int = 0
    """For repeated lines, the documents that lost some."""
    bytes: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


class Chosen:
    """The `most` items with the least hash of their names: the same ones in any order of arrival."""

    def __init__(self, most: int):
        self.most = most
        self.heap: list[tuple[float, int, dict[str, Any]]] = []

    def offer(self, name: str, number: int, item: dict[str, Any]) -> None:
        entry = (-hash_share(name), -number, item)
        if len(self.heap) < self.most:
            heapq.heappush(self.heap, entry)
        elif self.heap and entry[:2] > self.heap[0][:2]:
            heapq.heapreplace(self.heap, entry)

    def items(self) -> list[dict[str, Any]]:
        return [item for *_, item in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]


class Scores:
    """The classifier's scores of all documents: a histogram, and the documents at its two ends."""

    def __init__(self, most: int):
        self.most = most
        self.histogram = np.zeros(BINS, np.int64)
        self.ends: tuple[list, list] = ([], [])

    def add(self, score: float, number: int, key: str, text: str) -> None:
        self.histogram[min(int(score * BINS), BINS - 1)] += 1
        if self.most:
            item = {"key": key, "value": score, "text": text[:EXCERPT]}
            for end, sign in zip(self.ends, (-1, 1), strict=True):
                entry = (sign * score, -number, item)
                if len(end) < self.most:
                    heapq.heappush(end, entry)
                else:
                    heapq.heappushpop(end, entry)

    def as_json(self) -> dict[str, Any]:
        lowest, highest = ([item for *_, item in sorted(end, key=lambda e: e[:2], reverse=True)] for end in self.ends)
        return {"histogram": self.histogram.tolist(), "lowest": lowest, "highest": highest}


def pair_excerpts(text: str, twin: str) -> tuple[str, str]:
    """EXCERPT characters of both from shortly before they first differ."""
    same = next((i for i, (a, b) in enumerate(zip(text, twin, strict=False)) if a != b), min(len(text), len(twin)))
    start = max(0, same - BEFORE)
    if start >= min(len(text), len(twin)) - BEFORE:  # one is the other's beginning, or they differ in white space
        start = 0
    return text[start : start + EXCERPT], twin[start : start + EXCERPT]
