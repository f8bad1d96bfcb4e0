"""Held-out loss against training compute: L(C) = E + A C^-alpha, fitted on finished runs and carried on beyond them.

The law is Kaplan et al. 2020 (section 3) with the irreducible loss E of Hoffmann et al. 2022 (section 3.3), and so is
the fit: Huber loss, delta = 1e-3, on log residuals. L is in bits per byte of held-out text, C in FLOPs of forward and
backward (`counts.train_flops_per_token`).

A run gives one point, its last evaluation. Evaluations on the way are none: their learning rate has not come down yet,
so they lie above what a run of that length would reach (Hoffmann et al. 2022, section 3.1).
"""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lm.config import ConfigError, require
from moe_lm.scaling.counts import train_flops_per_token
from moe_lm.toml import load_config

HUBER = 1e-3
"""Residuals of log loss beyond which the Huber loss grows linearly (Hoffmann et al. 2022, section 3.3)."""
LEAST_POINTS = 4
"""Distinct computes that three constants and their uncertainty need."""
GPT4_FLOPS = 2.15e25
"""The reported training compute of GPT-4: the farthest row of the table."""
FAR = 10.0
"""Times the largest fitted compute beyond which the law is carried past what it saw."""


@dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    flops: float
    loss: float
    """Bits per byte of held-out text."""


@dataclass(frozen=True)
class Law:
    """loss = floor + scale (flops / unit)^-exponent."""

    floor: float
    """E: bits per byte that no compute gets below."""
    scale: float
    """A: bits per byte above the floor at `unit`."""
    exponent: float
    """alpha."""
    unit: float
    """FLOPs, in the middle of the fitted range."""

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * (flops / self.unit) ** -self.exponent


@dataclass(frozen=True)
class Fit:
    """A law, the runs it was fitted on and the laws of their resamples."""

    points: tuple[Point, ...]
    law: Law
    resampled: tuple[Law, ...]

    def interval(self, flops: float) -> tuple[float, float]:
        """Between which 80% of the resampled laws put the loss."""
        return middle([law.loss(flops) for law in self.resampled])


def read_run(directory: str | Path) -> Point:
    """The last evaluation of a finished run. Raises ConfigError where the directory holds none."""
    directory = Path(directory)
    config = load_config(directory / "config.toml")
    try:
        lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
        last = json.loads(lines[-1]) if lines else {}
    except (OSError, json.JSONDecodeError):
        raise ConfigError(f"{directory} holds no whole metrics.jsonl: name the directory of a finished run.") from None
    require(
        last.get("step") == config.train.steps and "val_bits_per_byte" in last,
        f"{directory} stopped at step {last.get('step', 0)} of {config.train.steps}: only a finished run, whose "
        "learning rate has come down, is a point of the law.",
    )
    per_token = train_flops_per_token(config.model, config.data.sequence_length)
    return Point(str(directory), per_token * last["tokens"], last["val_bits_per_byte"])


def read_runs(directories: Sequence[str | Path]) -> list[Point]:
    """The points of runs that were held out on the same text. Raises ConfigError where they were not."""
    texts = {}
    for directory in directories:
        data = load_config(Path(directory) / "config.toml").data
        texts.setdefault((data.sources, data.validation_fraction), directory)
    first, *other = texts.values()
    require(
        not other, f"{first} and {', '.join(map(str, other))} hold out different text: their losses do not compare."
    )
    return [read_run(directory) for directory in directories]


def fit(points: Sequence[Point], seed: int = 0, draws: int = 400) -> Fit:
    """The law of the points, and of `draws` resamples of its residuals. Raises ConfigError for too few computes."""
    distinct = {float(f"{point.flops:.2e}") for point in points}
    require(
        len(distinct) >= LEAST_POINTS,
        f"the law has three constants and needs runs of at least {LEAST_POINTS} distinct computes: these have "
        f"{len(distinct)}.",
    )
    unit = math.exp(statistics.fmean(math.log(point.flops) for point in points))
    x = [math.log(point.flops / unit) for point in points]
    y = [math.log(point.loss) for point in points]
    starts = [
        (math.log(share * math.exp(min(y)) + 1e-9), math.log((1 - share) * math.exp(statistics.median(y))), exponent)
        for share in (0.02, 0.5, 0.9)
        for exponent in (0.05, 0.2, 0.6)
    ]
    best = min((descend(x, y, start) for start in starts), key=lambda found: found[1])[0]
    expected = [predict(best, value)[0] for value in x]
    # Three constants took their share of the scatter: what is left is widened by the lost degrees of freedom.
    widened = math.sqrt(len(x) / (len(x) - 3))
    residuals = [(a - b) * widened for a, b in zip(y, expected, strict=True)]
    draw = random.Random(seed)
    resampled = []
    for _ in range(draws):
        drawn = [value + draw.choice(residuals) for value in expected]
        resampled.append(descend(x, drawn, best)[0])
    return Fit(tuple(points), as_law(best, unit), tuple(as_law(found, unit) for found in resampled))


def as_law(theta: tuple[float, float, float], unit: float) -> Law:
    return Law(math.exp(theta[0]), math.exp(theta[1]), theta[2], unit)


def predict(theta: tuple[float, float, float], x: float) -> tuple[float, float]:
    """The log of the loss at log compute x, and the share of it that lies above the floor."""
    floor, above = math.exp(theta[0]), math.exp(theta[1] - theta[2] * x)
    return math.log(floor + above), above / (floor + above)


def descend(
    x: Sequence[float], y: Sequence[float], theta: tuple[float, float, float]
) -> tuple[tuple[float, float, float], float]:
    """The constants (log E, log A, alpha) from `theta` on, and their Huber loss: Levenberg-Marquardt, reweighted."""
    loss, damping = huber(x, y, theta), 1e-2
    for _ in range(200):
        matrix, gradient = [[0.0] * 3 for _ in range(3)], [0.0] * 3
        for xi, yi in zip(x, y, strict=True):
            value, above = predict(theta, xi)
            residual = yi - value
            weight = min(1.0, HUBER / abs(residual)) if residual else 1.0
            slope = (1 - above, above, -above * xi)
            for i in range(3):
                gradient[i] += weight * slope[i] * residual
                for j in range(3):
                    matrix[i][j] += weight * slope[i] * slope[j]
        for i in range(3):
            matrix[i][i] += damping * (matrix[i][i] + 1e-9)
        step = solve(matrix, gradient)
        moved = tuple(min(max(a + max(-1.0, min(1.0, b)), -25.0), 25.0) for a, b in zip(theta, step, strict=True))
        tried = huber(x, y, moved)
        if tried < loss:
            gained, theta, loss, damping = loss - tried, moved, tried, damping / 5
            if gained < 1e-12 * loss:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return theta, loss


def huber(x: Sequence[float], y: Sequence[float], theta: tuple[float, float, float]) -> float:
    """Sum over the points."""
    total = 0.0
    for xi, yi in zip(x, y, strict=True):
        residual = abs(yi - predict(theta, xi)[0])
        total += residual**2 / 2 if residual <= HUBER else HUBER * (residual - HUBER / 2)
    return total


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination of three equations, with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(3):
        pivot = max(range(i, 3), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(3):
            if r != i:
                share = rows[r][i] / rows[i][i]
                rows[r] = [a - share * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][3] / rows[i][i] for i in range(3)]


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The values between which 80% lie."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def extrapolations(found: Fit) -> list[dict[str, float | bool]]:
    """The loss at 1, 10, 100, ... times the largest compute, and at GPT-4's; `beyond` is past FAR times the range."""
    largest = max(point.flops for point in found.points)
    flops = [largest * 10**power for power in range(max(2, math.ceil(math.log10(GPT4_FLOPS / largest))))]
    rows = []
    for compute in [*flops, GPT4_FLOPS]:
        low, high = found.interval(compute)
        times = compute / largest
        rows.append({"flops": compute, "times": times, "loss": found.law.loss(compute), "low": low, "high": high,
                     "beyond": times > FAR * (1 + 1e-9)})  # fmt: skip
    return rows


def to_json(found: Fit) -> dict:
    """The points, the constants with 80% intervals, the fitted range in FLOP and the extrapolations."""
    computes = [point.flops for point in found.points]
    constants = {
        name: {"value": getattr(found.law, name), "interval": middle([getattr(law, name) for law in found.resampled])}
        for name in ("floor", "scale", "exponent")
    }
    return {
        "points": [vars(point) for point in found.points],
        "law": {**constants, "unit_flops": found.law.unit},
        "fitted_range_flops": [min(computes), max(computes)],
        "extrapolations": extrapolations(found),
    }


def law_table(found: Fit) -> str:
    """The points, the law and what it says beyond them, with the fitted range beside every row."""
    data = to_json(found)
    law, (low, high) = found.law, data["fitted_range_flops"]
    lines = [
        f"Loss against compute, {len(found.points)} finished runs, their last evaluation each:", "",
        f"  {'run':<32} {'FLOP':>9}  bits per byte  law",
    ]  # fmt: skip
    for point in sorted(found.points, key=lambda point: point.flops):
        lines.append(f"  {point.name[-32:]:<32} {point.flops:>9.2e}  {point.loss:>13.4f}  {law.loss(point.flops):.4f}")
    lines += [
        "",
        f"L(C) = E + A (C / {law.unit:.2e} FLOP)^-alpha, with 80% intervals of {len(found.resampled)} resamples:",
    ]
    for letter, name, unit in (
        ("E", "floor", "bits per byte"),
        ("A", "scale", "bits per byte"),
        ("alpha", "exponent", ""),
    ):
        constant = data["law"][name]
        near, far = constant["interval"]
        lines.append(
            f"  {letter:<5} {constant['value']:.4g} {unit}({near:.4g} to {far:.4g})".replace("byte(", "byte (")
        )
    lines += ["", f"  {'FLOP':>9}  {'bits per byte':<24} fitted on {'(FLOP)':<14} times its end"]
    for row in data["extrapolations"]:
        span = f"{row['loss']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        beyond = "  beyond: not a prediction" if row["beyond"] else ""
        lines.append(f"  {row['flops']:>9.2e}  {span:<24} {low:.2e} to {high:.2e}  {row['times']:>9.3g}{beyond}")
    lines += [
        "",
        "Intervals: the scatter of these runs about this law. More than ten times beyond the largest run they do not",
        "hold: nothing was seen there, and the law is itself the assumption. All runs are taken as equally well tuned.",
    ]
    return "\n".join(lines)
