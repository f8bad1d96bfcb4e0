"""A picture of the measurements: every contender under the roofs of this device, and the sweep over tokens."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.bench.measure import Machine

MARKERS = "sD^v<>P*X"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c564b", "#999933", "#882255")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and three more."""


def draw(path: Path, machine: Machine, records: Sequence[dict[str, Any]], predicted: Sequence[tuple] = ()) -> None:
    """Write a PNG of the records; `predicted` are the tokens and seconds that a model gives for the sweep.

    Raises ValueError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib.") from None
    sweep = [r for r in records if r["op"] == "sweep"]
    others = [r for r in records if r["op"] != "sweep" and r["flops"]]
    panels = [panel for panel, wanted in ((roofs, others), (by_tokens, sweep)) if wanted]
    figure = Figure(figsize=(8.5 * max(1, len(panels)), 6), layout="constrained")
    figure.suptitle(f"{machine.name}, {machine.dtype}")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.set_xscale("log")
        axes.set_yscale("log")
        if panel is roofs:
            roofs(axes, machine, others)
        else:
            by_tokens(axes, sweep, predicted)
        axes.grid(True, which="major", color="0.9")
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=130)


def roofs(axes: Any, machine: Machine, records: Sequence[dict[str, Any]]) -> None:
    """FLOP/s over FLOP per byte, in cold calls; a colour for each operation, a filled circle for ours."""
    intensities = [r["flops"] / r["bytes"] for r in records]
    left, right = min(intensities) / 3, max(max(intensities), machine.gemm / machine.copy) * 3
    ridge = machine.gemm / machine.copy
    axes.plot([left, ridge, right], [left * machine.copy, machine.gemm, machine.gemm], color="black", linewidth=1.5)
    axes.annotate(
        f"measured GEMM, {machine.gemm / 1e12:.3g} TFLOP/s", (right, machine.gemm), xytext=(0, 4),
        textcoords="offset points", ha="right",
    )  # fmt: skip
    middle = math.sqrt(left * ridge)
    axes.annotate(
        f"measured copy, {machine.copy / 1e9:,.0f} GB/s", (middle, middle * machine.copy), xytext=(-8, 0),
        textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip
    several = len({r["shape"]["name"] for r in records}) > 1
    labels = [f"{r['op']}, {r['shape']['name']}" if several else r["op"] for r in records]
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(labels))}
    names = list(dict.fromkeys(r["contender"] for r in records if not r["ours"]))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}
    for r, label, x in zip(records, labels, intensities, strict=True):
        style = {"marker": "o", "s": 80, "color": colours[label], "zorder": 3} if r["ours"] else {
            "marker": markers[r["contender"]], "s": 45, "facecolors": "none", "edgecolors": colours[label], "zorder": 2,
        }  # fmt: skip
        axes.scatter([x], [r["cold"]["flops_per_s"]], **style)
    ours = [axes.scatter([], [], marker="o", s=80, color=colour, label=label) for label, colour in colours.items()]
    rest = [
        axes.scatter([], [], marker=marker, s=45, facecolors="none", edgecolors="0.3", label=name)
        for name, marker in markers.items()
    ]
    axes.add_artist(axes.legend(handles=ours, title="ours (filled), by operation", loc="lower right", fontsize=8))
    if rest:
        axes.legend(handles=rest, title="beside it", loc="lower center", fontsize=8)
    axes.set_xlabel("FLOP per byte, each operand moved once")
    axes.set_ylabel("FLOP/s, cold caches, median")
    axes.set_ylim(top=machine.gemm * 2.5)
    axes.set_title("Roofline")


def by_tokens(axes: Any, records: Sequence[dict[str, Any]], predicted: Sequence[tuple]) -> None:
    """Tokens per second over tokens, with quartiles as bars."""
    for i, name in enumerate(dict.fromkeys(r["contender"] for r in records)):
        mine = [r for r in records if r["contender"] == name]
        tokens = [r["shape"]["tokens"] for r in mine]
        median, low, high = (
            [n / r["cold"][key] for n, r in zip(tokens, mine, strict=True)] for key in ("median", "high", "low")
        )
        below, above = ([abs(m - v) for m, v in zip(median, side, strict=True)] for side in (low, high))
        ours = mine[0]["ours"]
        axes.errorbar(
            tokens, median, yerr=(below, above), color=COLOURS[i], marker="o" if ours else MARKERS[i], markersize=5,
            markerfacecolor=COLOURS[i] if ours else "none", linewidth=1.5, capsize=2, label=name,
        )  # fmt: skip
    if predicted:
        axes.plot([n for n, _ in predicted], [n / s for n, s in predicted], "--", color="black", label="predicted")
    axes.legend()
    axes.set_xscale("log", base=4)
    axes.set_xlabel("tokens")
    axes.set_ylabel("tokens/s, cold caches, median and quartiles")
    axes.set_title(f"expert_mlp by tokens, {records[0]['shape']['name']}")
