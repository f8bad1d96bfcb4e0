"""Experts that starve: named while the run goes on, when a change of its settings can still help them.

R layers that route, E experts. An expert's even share of a step's slots is 1 / E.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

STARVING_SHARE = 0.05
"""An expert starves in a step that gives it less than this part of its even share. A twentieth is far from the 0.2 to
0.5 of nano's least loaded experts in every step after its first hundred, and does not wait for the last token."""


class Starvation(NamedTuple):
    """One expert that has starved for long enough to be named."""

    layer: int
    """Its place among the layers that route."""
    expert: int
    since: int
    """The first step in which it starved."""
    step: int
    """The step after which it was named."""

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, expert {self.expert} starves: less than {STARVING_SHARE:.0%} of its even share in "
            f"each of the steps {self.since} to {self.step}"
        )


class StarvationWatch:
    """Counts, for every expert, the steps on end in which it starved, and names it once when they are `steps`.

    One step above the limit ends a starvation; the next one is named again. With `steps` = 0 it names nothing.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.hungry: dict[tuple[int, int], int] = {}
        """Steps on end so far of each expert, by layer and expert, that starved in the last step."""
        self.unlogged: list[Starvation] = []
        """What was named since the last line of metrics.jsonl."""

    def update(self, step: int, load: Sequence[Sequence[float]]) -> list[Starvation]:
        """Take in one step's load[R][E], shares of the slots; returns those who are to be named now."""
        if not self.steps:
            return []
        self.hungry = {
            (layer, expert): self.hungry.get((layer, expert), 0) + 1
            for layer, shares in enumerate(load)
            for expert, share in enumerate(shares)
            if share * len(shares) < STARVING_SHARE
        }
        due = [place for place, count in self.hungry.items() if count == self.steps]
        named = [Starvation(*place, step - self.steps + 1, step) for place in due]
        self.unlogged += named
        return named

    def log(self) -> dict[str, list[list[int]]]:
        """What a line of metrics.jsonl says: `starved`, rows of (layer, expert, since, step) since the last line."""
        named, self.unlogged = self.unlogged, []
        return {"starved": [list(row) for row in named]} if named else {}

    def state(self) -> dict[str, Any]:
        """All that a resumed run must know, as JSON holds it."""
        hungry = [[*place, count] for place, count in self.hungry.items()]
        return {"steps": self.steps, "hungry": hungry, "unlogged": [list(row) for row in self.unlogged]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; under another limit, who was named stays so, and who was not can still be."""

        def carried(count: int) -> int:
            if self.steps == state["steps"]:
                return count
            return max(count, self.steps) if count >= state["steps"] else min(count, self.steps - 1)

        if self.steps:
            self.hungry = {(layer, expert): carried(count) for layer, expert, count in state["hungry"]}
        self.unlogged = [Starvation(*row) for row in state["unlogged"]]


def named_in(lines: Iterable[Mapping[str, Any]]) -> list[Starvation]:
    """Every starvation that the lines of metrics.jsonl name, in order."""
    return [Starvation(*row) for line in lines for row in line.get("starved", ())]
