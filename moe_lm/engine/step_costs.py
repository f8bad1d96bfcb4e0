"""What steps take, by their size, on a machine that is now faster, now slower. Plain Python, no clock."""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable

WINDOW = 15
"""Step times of one size that are kept; their median is taken."""
ENOUGH = 2
"""Step times of one size that make it known. Of two the lower is taken, so that a first step that compiled does not
count."""
NEAR = 2.0
"""How many times larger or smaller a batch may be that stands in for one not measured yet: requests end one by one, and
with each the batch is a new one."""
REACH = 8
"""Steps over which the machine counts as equally fast: as far back goes what a step's time is compared with."""
SLOWER = 1.3
"""A step that takes so many times what it took when last compared may have become dearer, or the machine slower."""
EDGES = [*range(1, 9), *(edge << shift for shift in range(10) for edge in (10, 12, 14, 16))]
"""Sizes of steps: exact to 8, then four to each doubling."""


def bucket(number: int) -> int:
    """The size that `number` counts as: the next one of EDGES."""
    return EDGES[min(bisect_left(EDGES, number), len(EDGES) - 1)]


def alike(batch: int, tokens: int, other: int) -> int:
    """The size of a step of `other` sequences that has as many tokens for each as `tokens` are for `batch`."""
    return bucket(round(tokens * other / batch))


def median(values: Iterable[float]) -> float:
    """The lower one of two in the middle."""
    values = sorted(values)
    return values[(len(values) - 1) // 2]


class Medians:
    """Medians of the last values of each size."""

    def __init__(self):
        self.values: dict[int, deque[float]] = {}
        self.known: dict[int, float] = {}

    def record(self, size: int, value: float) -> None:
        values = self.values.setdefault(size, deque(maxlen=WINDOW))
        values.append(value)
        if len(values) >= ENOUGH:
            self.known[size] = median(values)

    def at(self, size: int) -> float | None:
        """The median, on a line between sizes that are known, below the smallest of them what it has; None above."""
        above = min((each for each in self.known if each >= size), default=None)
        if above is None:
            return None
        below = max((each for each in self.known if each <= size), default=above)
        if below == above:
            return self.known[above]
        share = (size - below) / (above - below)
        return self.known[below] + (self.known[above] - self.known[below]) * share


class StepCosts:
    """What steps take, by sequences in the step and by new tokens, both in buckets; and drafting.

    All but plain steps are kept as multiples of these, each found beside steps of another size just before: a shared
    machine is now faster, now slower, and what a step takes says nothing beside a plain one of a minute ago. For a
    batch not measured yet the nearest one stands in, with as many tokens per sequence.
    """

    def __init__(self):
        self.plain_steps, self.verifying, self.drafting = Medians(), defaultdict(Medians), defaultdict(Medians)
        self.recent: deque[tuple[int, int, float]] = deque(maxlen=REACH)
        """Batch, size and seconds of the last steps."""
        self.compared: dict[tuple[int, int], float] = {}
        """Seconds of the last step of a batch and size that was compared with others."""
        self.unmeasured: dict[int, int] = defaultdict(int)
        """Steps that guessed in a batch whose plain steps are not known."""
        self.nearest: dict[int, list[int]] = {}
        """What `near` found."""
        self.found: dict[tuple[int, int, int], float | None] = {}
        """What `times` found."""

    def near(self, batch: int) -> list[int]:
        """Batches whose plain steps are known and that may stand in for this one, nearest first."""
        own = bucket(batch)
        if own not in self.nearest:
            distance = {each: max(each, own) / min(each, own) for each in self.plain_steps.known}
            self.nearest[own] = sorted((each for each in distance if distance[each] <= NEAR), key=distance.get)
        return self.nearest[own]

    def measured(self, batch: int) -> bool:
        """Whether plain steps of this very batch are known."""
        return bucket(batch) in self.plain_steps.known

    def plain(self, batch: int) -> float | None:
        """Seconds of a step in which each of `batch` sequences brings one token; None while not known."""
        near = self.near(batch)
        return self.plain_steps.known[near[0]] if near else None

    def unit(self, batch: int, size: int | None = None) -> float | None:
        """Seconds that a plain step of `batch`, a bucket, takes now, by the last steps of other sizes than `size`."""
        known = self.verifying[batch].known
        found = [
            seconds / known[other]
            for each, other, seconds in self.recent
            if each == batch and other != size and other in known
        ]
        return median(found) if found else None

    def record(self, batch: int, tokens: int, seconds: float, length: int = 0, drafting: float = 0.0) -> None:
        """A step took so long, and before it drafting, of which the longest draft had `length` tokens."""
        own, was_measured = bucket(batch), self.measured(batch)
        size = alike(batch, tokens, own)
        if tokens == batch:
            self.plain_steps.record(own, seconds)
            if self.measured(batch):
                self.verifying[own].known[own] = 1.0
            if not was_measured:
                self.nearest.clear()
                self.found.clear()
        elif not was_measured:
            self.unmeasured[own] += 1
        elif size != own and (unit := self.unit(own, size)):
            self.verifying[own].record(size, seconds / unit)
            self.drafting[own].record(length, drafting / unit)
            self.compared[own, size] = seconds
            self.found.clear()
        self.recent.append((own, size, seconds))

    def slower(self) -> bool:
        """Whether the last steps, all of one size, took longer than when they were last compared with others."""
        kinds = {(batch, size) for batch, size, _ in self.recent}
        if len(kinds) != 1 or len(self.recent) < REACH or not (usual := self.compared.get(next(iter(kinds)))):
            return False
        return median([seconds for *_, seconds in self.recent]) > SLOWER * usual

    def times(self, batch: int, tokens: int, length: int) -> float | None:
        """How many plain steps' time a step takes together with drafting of at most `length` tokens; None where either
        is not known."""
        key = batch, tokens, length
        if key not in self.found:
            verifying, drafting = self.step_times(batch, tokens), self.draft_times(batch, length)
            self.found[key] = None if None in (verifying, drafting) else verifying + drafting
        return self.found[key]

    def step_times(self, batch: int, tokens: int) -> float | None:
        """How many plain steps' time a step takes: measured, or between a smaller and a larger measured one; None where
        neither is known."""
        for each in self.near(batch):
            if times := self.verifying[each].at(alike(batch, tokens, each)):
                return times
        return None

    def draft_times(self, batch: int, length: int) -> float | None:
        """How many plain steps' time drafting takes: as `step_times`, but not below what the shortest known took, whose
        first token costs several times what the next ones do, and at a constant rate beyond the longest."""
        for each in self.near(batch):
            if known := self.drafting[each].known:
                longest = max(known)
                return self.drafting[each].at(min(length, longest)) * max(1, length / longest)
        return None
