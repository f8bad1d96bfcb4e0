"""Predictions against what others measured, each also with constants that were refitted without the run's own family.

The constants of moe_lm.scaling.constants were fitted on some of these very runs, so their error there flatters them.
Leave-one-family-out is the honest figure: for every family the fitted constants are found again from the other families
of the same GPU, and the family is predicted with those.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moe_lm.scaling.constants import EFFICIENCY, ENGINES, FITTED, Efficiency
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.published import DecodeRun, TrainingRun
from moe_lm.scaling.serving import decode_rate, serve
from moe_lm.scaling.training import step_time

BARS = {"training": 0.15, "decode": 0.25}
"""The median error that each sort of run is allowed with its family left out."""

TIMES = ("step_seconds", "gpu_hours")
"""The quantities that are times; the others are rates."""

GRID = 1.03
"""Constants are tried at their value times powers of this."""
NODES = (-12, -6, 6, 12)
"""Powers at which predictions are asked for: 0.70, 0.84, 1.19 and 1.43 times the constant."""
REACH = 12
"""The largest power."""
STRIDES = (6, 3, 1)
"""Powers that a step of the search spans, from 19% down to 3%: a constant is known no better than that."""


@dataclass(frozen=True)
class Case:
    """A run, and what predicts it."""

    sort: str
    """`training` or `decode`."""
    run: TrainingRun | DecodeRun
    kind: str
    """Which constants hold for its GPU."""
    predict: Callable[[Efficiency], float]
    """The run's quantity, with these constants."""

    def slowness(self, reached: Efficiency) -> float:
        """Predicted over measured time."""
        ratio = self.predict(reached) / self.run.measured
        return ratio if self.run.quantity in TIMES else 1 / ratio


@dataclass(frozen=True)
class Row:
    """A run, predicted."""

    sort: str
    run: TrainingRun | DecodeRun
    predicted: float
    """With the constants as they are."""
    left_out: float | None
    """With constants refitted without the run's family; None where no other family ran on that GPU."""

    @property
    def error(self) -> float:
        return abs(self.predicted / self.run.measured - 1)

    @property
    def left_out_error(self) -> float | None:
        return None if self.left_out is None else abs(self.left_out / self.run.measured - 1)


@dataclass(frozen=True)
class Errors:
    """Errors of several runs as shares: the median and the quartiles."""

    runs: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Validation:
    """Every run predicted, and the constants that each family was predicted with when it was left out."""

    rows: tuple[Row, ...]
    refitted: dict[tuple[str, str, str], Efficiency]
    """By sort, GPU kind and family."""
    seconds: float
    """How long it took."""

    def errors(self, sort: str, left_out: bool, family: str | None = None) -> Errors | None:
        """Of the runs of a sort (and family) that are comparable; None where there are none."""
        shares = [
            row.left_out_error if left_out else row.error
            for row in self.rows
            if row.sort == sort and row.run.comparable and family in (None, row.run.family)
        ]
        shares = [share for share in shares if share is not None]
        if not shares:
            return None
        low, median, high = statistics.quantiles(shares, n=4, method="inclusive") if shares[1:] else shares * 3
        return Errors(len(shares), median, low, high)

    def passes(self, sort: str) -> bool:
        """Whether the median error with the family left out is within the bar."""
        found = self.errors(sort, left_out=True)
        return found is not None and found.median <= BARS[sort]


def validate(training: Sequence[TrainingRun], decode: Sequence[DecodeRun]) -> Validation:
    """Predict every run, as the constants are and with its family left out.

    Raises ConfigError for a run whose layout cannot be.
    """
    start = time.perf_counter()
    return evaluate([*map(training_case, training), *map(decode_case, decode)], start)


def training_case(run: TrainingRun) -> Case:
    model, layout = run.layout()
    sheet = run.machine().sheet

    def predict(reached: Efficiency) -> float:
        return run.from_step(step_time(model, layout, Machine(sheet, reached)).seconds)

    return Case("training", run, sheet.family, predict)


def decode_case(run: DecodeRun) -> Case:
    model, plan = run.plan()
    sheet, engine = run.machine().sheet, ENGINES.get(run.engine)

    def predict(reached: Efficiency) -> float:
        machine = Machine(sheet, reached)
        if not run.includes_prefill:
            return decode_rate(model, plan, machine, batch=run.batch, context=run.context, engine=engine)
        return serve(model, plan, machine, engine).tokens_per_s

    return Case("decode", run, sheet.family, predict)


def evaluate(cases: Sequence[Case], start: float) -> Validation:
    """The cases predicted; `start` is when that began, by time.perf_counter."""
    refitted: dict[tuple[str, str, str], Efficiency] = {}
    for sort, kind in sorted({(case.sort, case.kind) for case in cases}):
        group = [case for case in cases if (case.sort, case.kind) == (sort, kind)]
        search = Search(group, FITTED.get(sort, ()))
        for family in sorted({case.run.family for case in group}):
            others = [i for i, case in enumerate(group) if case.run.family != family and case.run.comparable]
            if others:
                refitted[sort, kind, family] = search.fit(others)
    rows = []
    for case in cases:
        reached = refitted.get((case.sort, case.kind, case.run.family))
        left_out = None if reached is None else case.predict(reached)
        rows.append(Row(case.sort, case.run, case.predict(EFFICIENCY[case.kind]), left_out))
    return Validation(tuple(rows), refitted, time.perf_counter() - start)


class Search:
    """Finds the constants of one GPU kind that predict a choice of cases best.

    Coordinate descent on the mean absolute logarithm of predicted over measured time. Predictions are asked for along
    each constant alone, at NODES, and their changes in time add up: parts of a step come one after the other, so that
    this is close, and every choice of cases is searched in the same tables. Only the search rests on them: a family
    that was left out is predicted with the constants themselves.
    """

    def __init__(self, cases: Sequence[Case], names: Sequence[str]):
        self.names = tuple(names)
        self.start = EFFICIENCY[cases[0].kind]
        base = [case.slowness(self.start) for case in cases]
        self.base = base
        self.change: list[list[list[float]]] = []
        """By constant, by power from -REACH on, by case: what it adds to the slowness."""
        for i in range(len(self.names)):
            at_nodes = {0: [0.0] * len(cases)}
            for node in NODES:
                constants = self.at(tuple(node if j == i else 0 for j in range(len(self.names))))
                moved = [case.slowness(constants) for case in cases]
                at_nodes[node] = [a - b for a, b in zip(moved, base, strict=True)]
            self.change.append([between(at_nodes, power) for power in range(-REACH, REACH + 1)])

    def at(self, powers: tuple[int, ...]) -> Efficiency:
        """The constants, each GRID ** power times where it started. Shares stay below 1, and multiples above."""
        changed = {}
        for name, power in zip(self.names, powers, strict=True):
            value = getattr(self.start, name)
            changed[name] = (min if value < 1 else max)(value * GRID**power, 1.0)
        return self.start._replace(**changed)

    def fit(self, chosen: Sequence[int]) -> Efficiency:
        """The constants that predict the cases of these indices best."""
        powers = [0] * len(self.names)
        slowness = {i: self.base[i] for i in chosen}
        least = spread(slowness.values())
        for stride in STRIDES:
            moved = True
            while moved:
                moved = False
                for name, tables in enumerate(self.change):
                    for power in (powers[name] + stride, powers[name] - stride):
                        if abs(power) > REACH:
                            continue
                        old, new = tables[powers[name] + REACH], tables[power + REACH]
                        tried = {i: value + new[i] - old[i] for i, value in slowness.items()}
                        if (error := spread(tried.values())) < least - 1e-9:
                            slowness, least, powers[name], moved = tried, error, power, True
                            break
        return self.at(tuple(powers))


def spread(slowness: Iterable[float]) -> float:
    """Mean absolute logarithm; tables that add up to no time at all count as far off."""
    return statistics.fmean(abs(math.log(max(value, 1e-3))) for value in slowness)


def between(at_nodes: dict[int, list[float]], power: int) -> list[float]:
    """What the cases change at `power`, on the line between the nodes around it."""
    below = max(node for node in at_nodes if node <= power)
    above = min(node for node in at_nodes if node >= power)
    share = (power - below) / (above - below) if above > below else 0.0
    return [a + share * (b - a) for a, b in zip(at_nodes[below], at_nodes[above], strict=True)]


def to_json(found: Validation) -> dict:
    """Errors by sort, with the bars; every run with its ratios; the refitted constants by sort, GPU kind and family."""
    sorts = {}
    for sort, bar in BARS.items():
        as_fitted, left_out = (found.errors(sort, left) for left in (False, True))
        sorts[sort] = {
            "as_fitted": as_fitted and vars(as_fitted),
            "left_out": left_out and vars(left_out),
            "bar": bar,
            "passes": found.passes(sort),
            "refitted_constants": FITTED.get(sort, ()),
        }
    runs = [
        {
            "sort": row.sort, "name": row.run.name, "family": row.run.family, "gpu": row.run.gpu,
            "quantity": row.run.quantity, "unit": row.run.unit, "measured": row.run.measured,
            "predicted": row.predicted, "left_out": row.left_out, "comparable": row.run.comparable,
            "verified": row.run.verified, "source": row.run.source,
        }
        for row in found.rows
    ]  # fmt: skip
    refitted = [
        {"sort": sort, "kind": kind, "family": family, **reached._asdict()}
        for (sort, kind, family), reached in found.refitted.items()
    ]
    return {"sorts": sorts, "runs": runs, "refitted": refitted, "seconds": found.seconds}


def validation_table(found: Validation) -> str:
    """Errors, then every run of each family with its ratios of predicted to measured, then the sources."""
    sources = {source: n for n, source in enumerate(dict.fromkeys(row.run.source for row in found.rows), 1)}
    lines = []
    for sort, bar in BARS.items():
        rows = [row for row in found.rows if row.sort == sort]
        if not rows:
            continue
        lines += [*summary(found, sort, bar), ""]
        lines.append(f"  {'':<50} {'measured':>10} {'':<22} {'fitted':>10} {'ratio':>6} {'unfitted':>10} {'ratio':>6}")
        for family in dict.fromkeys(row.run.family for row in rows):
            errors = [found.errors(sort, left, family) for left in (False, True)]
            shown = [f"{error.median:.0%}" for error in errors if error is not None]
            lines.append(f"  {family}" + (f": median error {' fitted, '.join(shown)} unfitted" if shown[1:] else ""))
            lines += [run_line(row, sources) for row in rows if row.run.family == family]
        lines.append("")
    lines += ["  * in no median: the source does not state the layout, or its figure holds lost time", "", "Sources:"]
    lines += [f"  [{n}] {source}" for source, n in sources.items()]
    lines += ["", f"{found.seconds:.1f} s"]
    return "\n".join(lines)


def summary(found: Validation, sort: str, bar: float) -> list[str]:
    """The errors of a sort, fitted and unfitted apart, and whether the latter are within the bar."""
    families = {row.run.family for row in found.rows if row.sort == sort and row.run.comparable}
    lines = [f"{sort.capitalize()}: error of {len(families)} families, median (quartiles)"]
    names = ", ".join(FITTED.get(sort, ())) or "none, no constant was fitted on these runs"
    for label, left_out in (("fitted: constants as they are", False), ("unfitted: its family left out", True)):
        errors = found.errors(sort, left_out)
        if errors is None:
            continue
        text = f"  {label:<32} {errors.runs:>4} runs  {errors.median:.1%} ({errors.low:.1%} to {errors.high:.1%})"
        if left_out:
            text += f"  bar {bar:.0%}: {'pass' if found.passes(sort) else 'miss'}"
        lines.append(text)
    lines.append(f"  refitted for each family and GPU kind: {names}")
    return lines


def run_line(row: Row, sources: dict[str, int]) -> str:
    run, mark = row.run, " " if row.run.comparable else "*"
    left_out = f"{'':>17}" if row.left_out is None else f"{row.left_out:>10.4g} {row.left_out / run.measured:>6.2f}"
    return (
        f"  {mark} {run.name:<48.48} {run.measured:>10.4g} {run.unit:<22} {row.predicted:>10.4g} "
        f"{row.predicted / run.measured:>6.2f} {left_out}  [{sources[run.source]}]"
    )
