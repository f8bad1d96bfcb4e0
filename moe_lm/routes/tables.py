"""The routes of a text as plain tables that fit 100 columns, and as what `--json` prints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_lm.routes import measures
from moe_lm.routes.classes import CLASSES
from moe_lm.routes.observe import MIN_COUNT, Characteristic, LayerRoutes, Routes, span_name
from moe_lm.scaling.text import table

WIDTH = 100
MOST_EXPERTS = 32
"""Experts of a layer that the terminal lists, the most loaded ones where there are more."""
MOST_PAIRS = 8
JSON_TOKENS = 12
"""Characteristic tokens of each expert in JSON."""


def quoted(text: str) -> str:
    """A token's text on one line, with what cannot be seen spelt out: `' def'`, `':\\n'`, `' '*12`."""
    if len(text) > 2 and not text.strip(" "):
        return f"' '*{len(text)}"
    return "'" + repr(text)[1:-1].replace("\\'", "'") + "'"


def told_best(routes: Routes) -> int:
    """The layer whose choices the class of a token tells most about."""
    return max(range(len(routes.layers)), key=lambda i: measures.information(routes.layers[i].by_class))


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def layer_rows(routes: Routes) -> tuple[list[str], list[list[str]]]:
    """One row for each layer; the head first."""
    head = ["", "load", "dead", "entropy", "confidence", "class tells", "position", "next again", "by chance"]
    rows = []
    for i, layer in enumerate(routes.layers):
        load = layer.load
        by_chance = measures.again_if_independent(layer.counts, layer.tokens, layer.top_k)
        rows.append([
            f"layer {i}", f"{load.min():.2f}-{load.max():.2f}x", str(len(layer.dead)), f"{layer.entropy:.2f}",
            f"{layer.confidence:.1%}", f"{measures.information(layer.by_class):.1%}",
            f"{measures.information(layer.by_position):.1%}", percent(layer.again), f"{by_chance:.1%}",
        ])  # fmt: skip
    return head, rows


def window_rows(routes: Routes) -> tuple[list[str], list[list[str]]]:
    """Distinct experts by the tokens of a window: in each layer, of independent tokens there, of uniform choices."""

    def row(name: str, values: Sequence[float | None]) -> list[str]:
        return [name, *("-" if value is None else f"{value:.2f}" for value in values)]

    rows = []
    for i, layer in enumerate(routes.layers):
        rows.append(row(f"layer {i}", layer.distinct))
        rows.append(row("  if independent", measures.distinct_if_independent(layer.counts, layer.tokens)))
    rows.append(row("uniform", measures.distinct_if_uniform(routes.experts, routes.top_k)))
    return ["tokens", *map(str, measures.WINDOWS)], rows


def favourites(ratios: np.ndarray, counts: np.ndarray, most: int = 4) -> str:
    """`e3 4.1x 26%`: the experts that a kind of token goes to most, how much oftener than all do, and their share."""
    order = np.argsort(-counts, kind="stable")[:most]
    return "  ".join(f"e{e} {ratios[e]:.1f}x {counts[e] / counts.sum():.0%}".ljust(13) for e in order if counts[e])


def kind_rows(names: Sequence[str], sizes: Sequence[int], counts: np.ndarray) -> list[list[str]]:
    """For each kind of token that came: its name, its tokens, and where they went; counts (kinds, E)."""
    ratios = measures.lift(counts)
    return [
        [name, f"{size:,}", favourites(ratios[i], counts[i])]
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        if size
    ]


def left_aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is text: to the left, and cut at WIDTH."""
    columns = table([row[:-1] for row in rows], head[:-1]).split("\n")
    width = max(map(len, columns))
    return "\n".join(
        f"{line.ljust(width)}  {last}".rstrip()[:WIDTH]
        for line, last in zip(columns, [head[-1], *(row[-1] for row in rows)], strict=True)
    )


def expert_rows(routes: Routes, layer: LayerRoutes) -> list[list[str]]:
    """For each expert: load, the class that it takes most above that class's share, and its characteristic tokens."""
    ratios = measures.lift(layer.by_class)
    seen = layer.by_class.sum(1) >= MIN_COUNT * layer.top_k
    rows = []
    for expert in sorted(np.argsort(-layer.counts, kind="stable")[:MOST_EXPERTS].tolist()):
        best = int(np.argmax(np.where(seen, ratios[:, expert], 0)))
        kind = f"{CLASSES[best]} {ratios[best, expert]:.1f}x" if layer.counts[expert] else "-"
        tokens = "  ".join(quoted(routes.texts[each.id]) for each in layer.characteristic[expert][:8])
        rows.append([f"e{expert}", f"{layer.load[expert]:.2f}x", kind, tokens or "-"])
    return rows


def pair_list(layer: LayerRoutes) -> list[tuple[int, int, int, float]]:
    """(first, second, tokens that chose both, expected of independence) of every pair, the most surprising first.

    Surprise is (observed - expected) / sqrt(expected), the standardised residual, so that chance in rare pairs does not
    come first.
    """
    expected = measures.independent_pairs(layer.counts, layer.top_k)
    first, second = np.triu_indices(layer.experts, 1)
    observed, hoped = layer.pairs[first, second], expected[first, second]
    surprise = np.divide(observed - hoped, np.sqrt(hoped), out=np.zeros(len(hoped)), where=hoped > 0)
    order = np.argsort(-surprise, kind="stable")
    return [(int(first[i]), int(second[i]), int(observed[i]), float(hoped[i])) for i in order]


def pair_text(layer: LayerRoutes) -> str:
    """The pairs that come oftener and rarer than by chance, in two lines."""
    if layer.top_k == 1:
        return "A token goes to one expert, so there are no pairs."

    def shown(pairs: Sequence[tuple[int, int, int, float]]) -> str:
        parts = [f"e{a}+e{b} {count / hoped:.1f}x ({count})" for a, b, count, hoped in pairs if hoped > 0]
        line = ""
        for part in parts:
            line = f"{line}  {part}" if len(line) + len(part) < WIDTH - 12 else line
        return line.strip() or "none"

    pairs = pair_list(layer)
    most = [pair for pair in pairs if pair[2] > pair[3]][:MOST_PAIRS]
    least = [pair for pair in reversed(pairs) if pair[2] < pair[3]][:MOST_PAIRS]
    return f"together  {shown(most)}\napart     {shown(least)}"


def layer_text(routes: Routes, number: int) -> str:
    """Everything of one layer."""
    layer = routes.layers[number]
    kinds = kind_rows(CLASSES, [routes.kinds[i] for i in range(len(CLASSES))], layer.by_class)
    spans = kind_rows(
        [span_name(i) for i in range(layer.spans)], [routes.spans[i] for i in range(layer.spans)], layer.by_position
    )
    listed = f", the {MOST_EXPERTS} most loaded" if layer.experts > MOST_EXPERTS else ""
    return "\n\n".join([
        f"Layer {number}: experts that a token goes to, how much oftener than all tokens do, and their share",
        left_aligned(["class", "tokens", "most often"], kinds),
        left_aligned(["position", "tokens", "most often"], spans),
        f"Layer {number}: experts{listed}, and tokens of at least {MIN_COUNT} visits by how much oftener they come",
        left_aligned(["", "load", "class", "tokens"], expert_rows(routes, layer)),
        f"Layer {number}: pairs that tokens choose, as a multiple of what the experts' loads explain (tokens)",
        pair_text(layer),
    ])  # fmt: skip


def text(title: str, routes: Routes, layers: Sequence[int]) -> str:
    """The whole answer for a terminal, with the details of some layers."""
    again = "next again: of a token's experts, the share that the next token chooses too"
    return "\n\n".join([
        title,
        table(layer_rows(routes)[1], layer_rows(routes)[0]),
        "class tells, position: share of the entropy of the expert that they explain\n" + again,
        "Distinct experts of consecutive tokens, which a step that verifies so many has to read",
        table(window_rows(routes)[1], window_rows(routes)[0]),
        *(layer_text(routes, number) for number in layers),
    ])  # fmt: skip


def as_json(model: str, names: Sequence[str], length: int, routes: Routes, layers: Sequence[int]) -> dict[str, Any]:
    """Everything as plain values. Ratios are rounded to five digits; experts are list indices."""

    def rounded(values: Any) -> Any:
        return np.round(values, 5).tolist()

    def characteristic(each: Characteristic) -> dict[str, Any]:
        return {"id": each.id, "text": routes.texts[each.id], "count": each.count, "lift": round(each.lift, 5)}

    found = []
    for number in layers:
        layer = routes.layers[number]
        found.append({
            "layer": number, "load": rounded(layer.load), "dead": layer.dead, "entropy": layer.entropy,
            "confidence": layer.confidence, "class_tells": measures.information(layer.by_class),
            "position_tells": measures.information(layer.by_position), "next_again": layer.again,
            "next_again_if_independent": measures.again_if_independent(layer.counts, layer.tokens, layer.top_k),
            "distinct": layer.distinct,
            "distinct_if_independent": measures.distinct_if_independent(layer.counts, layer.tokens),
            "lift_by_class": dict(zip(CLASSES, rounded(measures.lift(layer.by_class)), strict=True)),
            "lift_by_position": {
                span_name(i): row for i, row in enumerate(rounded(measures.lift(layer.by_position)))
            },
            "pairs": layer.pairs.tolist(),
            "pairs_if_independent": rounded(measures.independent_pairs(layer.counts, layer.top_k)),
            "characteristic": [[characteristic(each) for each in one[:JSON_TOKENS]] for one in layer.characteristic],
        })  # fmt: skip
    return {
        "model": model, "text": list(names), "tokens": routes.tokens, "context": length, "experts": routes.experts,
        "experts_per_token": routes.top_k,
        "classes": {name: routes.kinds[i] for i, name in enumerate(CLASSES)},
        "positions": {span_name(i): count for i, count in sorted(routes.spans.items())},
        "distinct_if_uniform": measures.distinct_if_uniform(routes.experts, routes.top_k), "layers": found,
    }  # fmt: skip
