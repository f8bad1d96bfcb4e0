"""A row of the table: what is reported, what the configs give, and whether the two agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "shown", "contradiction", "off"]
ORDER: tuple[Verdict, ...] = ("shown", "ok", "contradiction", "off")
"""From the mildest: a row's verdict is the last that one of its figures has."""

Value = float | str


@dataclass(frozen=True)
class Figure:
    """One number of a row."""

    name: str
    computed: Value
    unit: str
    verdict: Verdict
    reported: Value | None = None
    """None where nothing is reported and the figure is only shown."""

    @property
    def difference(self) -> float | None:
        """Computed over reported, less 1; None where either is no number."""
        if isinstance(self.reported, str) or isinstance(self.computed, str) or not self.reported:
            return None
        return self.computed / self.reported - 1


@dataclass(frozen=True)
class Row:
    """A fact of the table; its first figure is the one that it is about."""

    id: str
    claim: str
    """What is reported, in a few words."""
    figures: tuple[Figure, ...]
    derivation: str
    """One line: how the figures come from the config, and what to think of them."""

    @property
    def verdict(self) -> Verdict:
        return max((figure.verdict for figure in self.figures), key=ORDER.index)

    def as_json(self) -> dict[str, Any]:
        """The row, its first figure at the top and every one of them in `figures`."""
        first, *_ = told = [
            {"name": each.name, "reported": each.reported, "computed": each.computed, "unit": each.unit,
             "difference": each.difference, "verdict": each.verdict}
            for each in self.figures
        ]  # fmt: skip
        top = {key: first[key] for key in ("reported", "computed", "unit", "difference")}
        return {"id": self.id, "claim": self.claim, **top, "verdict": self.verdict, "derivation": self.derivation,
                "figures": told}  # fmt: skip


FACTS: dict[str, Callable[[], Row]] = {}
"""Every fact by its id, in the order of the table."""


@dataclass
class Draft:
    """The figures of a row while it is computed."""

    figures: list[Figure] = field(default_factory=list)

    def near(self, name: str, computed: float, reported: float, unit: str, tolerance: float) -> None:
        """A number that must be within `tolerance` of what is reported, as a share of it."""
        close = abs(computed - reported) <= tolerance * abs(reported)
        self.figures.append(Figure(name, computed, unit, "ok" if close else "off", reported))

    def exact(self, name: str, computed: Value, reported: Value, unit: str) -> None:
        """A number that must be the reported one."""
        self.figures.append(Figure(name, computed, unit, "ok" if computed == reported else "off", reported))

    def bound(self, name: str, computed: Value, reported: str, unit: str, holds: bool) -> None:
        """Something reported as a bound or an interval, which holds or does not."""
        self.figures.append(Figure(name, computed, unit, "ok" if holds else "off", reported))

    def contradiction(self, name: str, computed: Value, reported: Value, unit: str) -> None:
        """A report that does not follow from its own premises."""
        self.figures.append(Figure(name, computed, unit, "contradiction", reported))

    def show(self, name: str, computed: Value, unit: str = "", reported: Value | None = None) -> None:
        """A figure that nothing reported can be held against."""
        self.figures.append(Figure(name, computed, unit, "shown", reported))


def fact(id: str, claim: str) -> Callable[[Callable[[Draft], str]], Callable[[], Row]]:
    """Enter a function into FACTS: it puts figures into the draft and returns the derivation."""

    def enter(compute: Callable[[Draft], str]) -> Callable[[], Row]:
        def row() -> Row:
            draft = Draft()
            derivation = compute(draft)
            return Row(id, claim, tuple(draft.figures), derivation)

        assert id not in FACTS, id
        FACTS[id] = row
        return row

    return enter


def listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
