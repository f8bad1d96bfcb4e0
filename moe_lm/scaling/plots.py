"""Pictures of a plan: latency against price, memory by layout, rates against batch, the roofline, validation, a law.

Each function takes plain rows (named in its docstring) and gives the bytes of a PNG, which moe_lm.scaling.pictures
writes or embeds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from moe_lm.config import ConfigError
from moe_lm.scaling.frontier import FrontierPoint, SweepRow, unbeaten
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.laws import Fit
from moe_lm.scaling.operations import Operation
from moe_lm.scaling.validate import TIMES, Validation

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
MARKERS = "osD^v<>P"
GB = 1e9


def canvas(title: str, x: str, y: str, *, height: float = 5.6, log: str = "") -> tuple[Any, Any]:
    """A figure of 1000 pixels' width with one pair of axes; `log` names those that are logarithmic.

    Raises ConfigError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install 'moe-lm[bench]'.") from None
    figure = Figure(figsize=(8.33, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(True, which="major", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plain(axis: Any) -> None:
    """Labels of a logarithmic axis as 1,000 and 0.01, at 1, 2 and 5 of every decade where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def frontier_plot(points: Sequence[FrontierPoint], title: str) -> bytes:
    """Dollars per 1,000 tokens of answers against ms per token: a colour for each tp x pp, the best joined."""
    figure, axes = canvas(title, "ms from a token of an answer to its next", "dollars per 1,000 tokens of answers",
                          log="xy")  # fmt: skip
    layouts = sorted({(point.plan.tp, point.plan.pp, point.plan.ep) for point in points}, key=math.prod)
    best = [point for point in points if point.best]
    axes.plot([1e3 * point.per_token for point in best], [point.price for point in best], color="0.25", linewidth=2,
              zorder=1)  # fmt: skip
    for i, layout in enumerate(layouts):
        mine = unbeaten([point for point in points if (point.plan.tp, point.plan.pp, point.plan.ep) == layout])
        tp, pp, ep = layout
        name = f"tp {tp} x pp {pp}" + (f" x ep {ep}" if ep > 1 else "")
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        axes.plot([1e3 * p.per_token for p in mine], [p.price for p in mine], linewidth=0.7, markersize=4, alpha=0.75,
                  label=name, **style)  # fmt: skip
    for point in thinned(best):
        axes.annotate(
            f"batch {point.plan.batch:,}", (1e3 * point.per_token, point.price), xytext=(-7, -9),
            textcoords="offset points", fontsize=8, ha="right", color="0.25",
        )  # fmt: skip
    axes.margins(x=0.1)
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.legend(fontsize=8, title="dark line: nothing beats it", title_fontsize=8, frameon=False, ncols=2)
    return png(figure)


def thinned(points: Sequence[Any], most: int = 6) -> list[Any]:
    """At most so many of them, evenly spaced, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[i * (len(points) - 1) // (most - 1)] for i in range(most)]


def memory_plot(layouts: Mapping[str, Any], title: str) -> bytes:
    """Bytes on the fullest GPU by component, a bar for each name; the rows are StageMemory or ServingMemory."""
    components = component_bytes(layouts)
    figure, axes = canvas(title, "GB on the fullest GPU", "", height=2.2 + 0.46 * len(layouts))
    axes.grid(False, axis="y")
    names, limits = list(layouts), [memory.limit / GB for memory in layouts.values()]
    left = [0.0] * len(names)
    for i, (component, values) in enumerate(components.items()):
        axes.barh(names, [value / GB for value in values], left=left, height=0.62, label=component,
                  color=COLOURS[i % len(COLOURS)], edgecolor="white", linewidth=0.6)  # fmt: skip
        left = [a + value / GB for a, value in zip(left, values, strict=True)]
    reach = 1.12 * max(*left, *limits)
    for row, (total, limit) in enumerate(zip(left, limits, strict=True)):
        fits = total <= limit
        place = limit if total <= limit < total + 0.12 * reach else total  # clear of the line
        axes.annotate(f" {total:,.1f}" + ("" if fits else "  does not fit"), (place, row), va="center", fontsize=9,
                      fontweight="normal" if fits else "bold")  # fmt: skip
    axes.vlines(limits, [i - 0.42 for i in range(len(names))], [i + 0.42 for i in range(len(names))], color="black",
                linewidth=1.5)  # fmt: skip
    axes.annotate(
        f"limit {limits[0]:,.1f} GB", (limits[0], -0.5), xytext=(4, 2), textcoords="offset points", fontsize=9
    )
    axes.set_xlim(0, reach * 1.1)
    axes.set_ylim(len(names) - 0.4, -0.85)
    figure.legend(fontsize=9, ncols=len(components), loc="outside lower center", frameon=False)
    return png(figure)


def component_bytes(layouts: Mapping[str, Any]) -> dict[str, list[float]]:
    """By component, the bytes in each layout; without those that are nowhere."""
    kinds = ("weights", "gradients", "optimizer", "activations", "cache", "state", "buffers", "overhead")
    found = {kind: [getattr(memory, kind, 0.0) for memory in layouts.values()] for kind in kinds}
    return {kind: values for kind, values in found.items() if any(values)}


def batch_plot(rows: Sequence[SweepRow], title: str) -> bytes:
    """Tokens/s of all requests against their number, a line for each context; hollow where memory does not hold it."""
    figure, axes = canvas(title, "requests that decode together", "tokens/s, all requests together", log="xy")
    contexts = sorted({row.context for row in rows})
    for i, context in enumerate(contexts):
        mine = [row for row in rows if row.context == context]
        held = [row for row in mine if row.fits]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "o", "markersize": 5}
        axes.plot([r.batch for r in mine], [r.tokens_per_s for r in mine], linewidth=1, linestyle=":",
                  markerfacecolor="white", **style)  # fmt: skip
        axes.plot([r.batch for r in held], [r.tokens_per_s for r in held], linewidth=2, **style)
    ends = [max((row for row in rows if row.context == context), key=lambda row: row.batch) for context in contexts]
    low, high = axes.get_ylim()
    places = apart([math.log(row.tokens_per_s) for row in ends], 0.05 * math.log(high / low))
    for i, (row, place) in enumerate(zip(ends, places, strict=True)):
        axes.annotate(f"{row.context:,} tokens", (row.batch, math.exp(place)), xytext=(8, 0), va="center",
                      textcoords="offset points", color=COLOURS[i % len(COLOURS)], fontsize=9)  # fmt: skip
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.margins(x=0.14)
    axes.annotate("by tokens of context; hollow: does not fit", (0.01, 0.97), xycoords="axes fraction", fontsize=9,
                  color="0.35", va="top")  # fmt: skip
    return png(figure)


def apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, from the largest down, moved so that each is at least `gap` below the one above it."""
    places = list(values)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for above, below in itertools.pairwise(order):
        places[below] = min(places[below], places[above] - gap)
    return places


def roofline_plot(points: Sequence[Operation], machine: Machine, title: str, dtype: str = "bfloat16") -> bytes:
    """FLOP/s against FLOP per byte under the sheet's roofs and, dashed, what the constants say is reached of them."""
    sheet, reached = machine.sheet, machine.reached
    figure, axes = canvas(title, "FLOP per byte moved", "TFLOP/s of one GPU", log="xy")
    peak, ridge = sheet.peak(dtype), sheet.peak(dtype) / sheet.bandwidth
    low = min(point.intensity for point in points) / 2
    high = max(ridge * 6, max(point.intensity for point in points) * 3)
    for a, b, style in ((1.0, 1.0, "-"), (reached.gemm, reached.bandwidth, "--")):
        knee = ridge * a / b
        axes.plot([low, knee, high], [low * sheet.bandwidth * b / 1e12, peak * a / 1e12, peak * a / 1e12], style,
                  color="black", linewidth=1.3)  # fmt: skip
    axes.annotate(f"{peak / 1e12:,.0f} TFLOP/s {dtype}", (high, peak / 1e12), xytext=(0, 4), ha="right", fontsize=9,
                  textcoords="offset points")  # fmt: skip
    axes.annotate(f"{sheet.bandwidth / 1e12:.2f} TB/s", (low * 4, low * 4 * sheet.bandwidth / 1e12), xytext=(-4, 6),
                  ha="right", fontsize=9, textcoords="offset points")  # fmt: skip
    names = list(dict.fromkeys(point.name for point in points))
    phases = list(dict.fromkeys(point.phase for point in points))
    for i, name in enumerate(names):
        for n, phase in enumerate(phases):
            for point in points:
                if (point.name, point.phase) == (name, phase):
                    axes.plot([point.intensity], [point.rate / 1e12], MARKERS[n], markersize=8, zorder=3,
                              color=COLOURS[i % len(COLOURS)], markeredgecolor="white")  # fmt: skip
    handles = [axes.plot([], [], "s", color=COLOURS[i % len(COLOURS)], label=name)[0] for i, name in enumerate(names)]
    shapes = [axes.plot([], [], MARKERS[n], color="0.4", label=phase)[0] for n, phase in enumerate(phases)]
    axes.add_artist(axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False))
    axes.legend(handles=shapes, loc="upper left", fontsize=9, frameon=False)
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_ylim(top=3 * peak / 1e12)
    return png(figure)


def validation_plot(found: Validation, title: str) -> bytes:
    """Predicted over measured speed of every run that counts, without its family; a row for each family."""
    rows = [row for row in found.rows if row.run.comparable and row.left_out is not None]
    families = list(dict.fromkeys((row.sort, row.run.family) for row in rows))
    figure, axes = canvas(title, "predicted / measured speed, with its family left out of the fit", "", log="x",
                          height=1.6 + 0.2 * len(families))  # fmt: skip
    axes.axvspan(1 / 1.25, 1.25, color="0.95", zorder=0)
    axes.axvline(1, color="0.4", linewidth=1)
    for row in rows:
        colour = COLOURS[0] if row.sort == "training" else COLOURS[1]
        ratio = row.left_out / row.run.measured
        speed = 1 / ratio if row.run.quantity in TIMES else ratio
        place = families.index((row.sort, row.run.family))
        axes.plot([speed], [place], "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
    axes.set_yticks(range(len(families)), [family for _, family in families], fontsize=8)
    for label, (sort, _) in zip(axes.get_yticklabels(), families, strict=True):
        label.set_color(COLOURS[0] if sort == "training" else COLOURS[1])
    axes.set_ylim(len(families) - 0.4, -0.6)
    axes.annotate("blue: training, orange: decode; grey band: within 25%", (1, 1.005), xycoords="axes fraction",
                  fontsize=8, ha="right", color="0.35")  # fmt: skip
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    return png(figure)


def law_plot(found: Fit, title: str, beyond: float = 1e3) -> bytes:
    """The runs, the law within their range and, dotted with its interval, up to `beyond` times the largest."""
    figure, axes = canvas(title, "training FLOP", "bits per byte of held-out text", log="x")
    flops = sorted(point.flops for point in found.points)
    inside = [flops[0] * (flops[-1] / flops[0]) ** (i / 40) for i in range(41)]
    outside = [flops[-1] * beyond ** (i / 40) for i in range(41)]
    band = [found.interval(compute) for compute in outside]
    axes.fill_between(outside, [low for low, _ in band], [high for _, high in band], color=COLOURS[0], alpha=0.15,
                      linewidth=0)  # fmt: skip
    axes.plot(outside, [found.law.loss(compute) for compute in outside], ":", color=COLOURS[0])
    axes.plot(inside, [found.law.loss(compute) for compute in inside], color=COLOURS[0], linewidth=2)
    axes.plot([p.flops for p in found.points], [p.loss for p in found.points], "o", color=COLOURS[1], zorder=3)
    axes.axvline(flops[-1], color="0.6", linewidth=1)
    axes.annotate("largest run", (flops[-1], axes.get_ylim()[1]), xytext=(4, -10), textcoords="offset points",
                  fontsize=9, color="0.35")  # fmt: skip
    return png(figure)
