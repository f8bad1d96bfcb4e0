"""`--html`: the text coloured by expert, and what the routers did with it in pictures, in a file that loads nothing."""

import json
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from moe_lm.checkpoint.directory import replace_file
from moe_lm.routes import measures
from moe_lm.routes.classes import CLASSES
from moe_lm.routes.observe import LayerRoutes, Routes, span_name
from moe_lm.routes.tables import expert_rows, layer_rows, percent, told_best, window_rows
from moe_lm.scaling.html import Table, Tile, document, section, table_html, tiles_html
from moe_lm.train.charts import CHART_STYLE, Line, color_bar, heat_grid, layer_line, line_chart, thin

MOST_TOKENS, LEAST_TOKENS, MOST_CHOICES = 4096, 64, 60_000
"""Tokens that a page shows: no more than have MOST_CHOICES choices over all layers, each of which takes 7 bytes."""
MOST_TEXT = 48
"""Characters of one token that a page shows; a tokenizer may know lines of spaces that are longer."""
MOST_LAYERS = 8
"""Layers whose maps a page draws, and of these MAPPED_EXPERTS experts, the most loaded where there are more."""
MAPPED_EXPERTS = 64
MOST_BYTES = 2_500_000
"""What the limits above keep every page below."""

STATIC = Path(__file__).parent / "static"
ROVING = Path(__file__).parents[1] / "server" / "static" / "dom.js"
"""The server's page moves between tokens by the same keys."""


def shown_tokens(layers: int, top_k: int) -> int:
    """Tokens at the head of the text that a page shows, of a model of so many layers that route."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, MOST_CHOICES // (layers * top_k)))


def write_page(path: Path, model: str, title: str, routes: Routes, layers: Sequence[int]) -> None:
    """Write the page of a text's routes. Raises OSError where that cannot be."""
    replace_file(path, page(model, title, routes, layers))


def page(model: str, title: str, routes: Routes, layers: Sequence[int]) -> str:
    """The whole page; the maps are of `layers`, of MOST_LAYERS among them where they are more."""
    name = Path(model).resolve().name
    drawn = thin(layers, MOST_LAYERS)
    note = "" if len(drawn) == len(layers) else f" Of {len(layers)} layers, {len(drawn)} are drawn."
    body = [
        f"<header><h1>Routes of {escape(name)}</h1><p>{escape(title)}.</p></header>",
        tiles_html(tiles(routes)),
        section("Text", text_html(routes)),
        section("Load", load_html(routes)),
        section("Classes of tokens", class_html(routes, drawn, note)),
        section("Position", position_html(routes, drawn, note)),
        section("Pairs", pairs_html(routes, drawn, note)),
        section("Consecutive tokens", window_html(routes)),
        section("What each expert takes", expert_html(routes, drawn, note)),
    ]
    return document(f"Routes of {name}", CHART_STYLE + palette(routes.experts) + style(), body, script())


def style() -> str:
    return (STATIC / "routes.css").read_text("utf-8")


def script() -> str:
    """Our module behind that of the server's page which it imports from, as one."""
    roving = re.sub(r"(?m)^export ", "", ROVING.read_text("utf-8"))
    own = re.sub(r"(?m)^import .*\n", "", (STATIC / "routes.js").read_text("utf-8"))
    return f"\n{roving}\n{own}"


def note_html(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def tiles(routes: Routes) -> list[Tile]:
    best = told_best(routes)
    layers = routes.layers
    dead = sum(len(layer.dead) for layer in layers)
    told = measures.information(layers[best].by_class)
    again = [layer.again for layer in layers if layer.again is not None]
    mean = float(np.mean(again)) if again else None
    by_chance = np.mean([measures.again_if_independent(each.counts, each.tokens, each.top_k) for each in layers])
    used = f"{dead} of {routes.experts * len(layers)} unused" if dead else "all of them used"
    return [
        Tile("tokens", f"{routes.tokens:,}", f"{len(routes.texts):,} different ones"),
        Tile("experts", f"{routes.experts}", f"{routes.top_k} per token, in {len(layers)} layers; {used}"),
        Tile("told by the class", f"{told:.0%}", f"of the choice of expert, in layer {best}"),
        Tile("chosen again", percent(mean), f"by the next token; {by_chance:.1%} by chance"),
    ]


# The text


def text_html(routes: Routes) -> str:
    """The text, a span for each token, with the controls and the place for what a token's experts are."""
    layers, layer = len(routes.layers), told_best(routes)
    choices = np.concatenate(routes.head_choices, axis=1)
    weights = np.concatenate(routes.head_weights, axis=1)
    options = "".join(
        f'<option value="{i}"{" selected" if i == layer else ""}>layer {i}</option>' for i in range(layers)
    )
    chips = "".join(
        f'<button type="button" class="e{e}" data-expert="{e}" aria-pressed="false">{e}</button>'
        for e in range(routes.experts)
    )
    spans = "".join(
        f'<span class="e{expert}">{token_html(token.text)}</span>'
        for token, expert in zip(routes.head, choices[layer, :, 0].tolist(), strict=True)
    )
    cut = ""
    if len(routes.head) < routes.tokens:
        cut = (
            f" The first {len(routes.head):,} of {routes.tokens:,} tokens are shown, so that the page stays small; all "
            "of them are counted below."
        )
    data = {  # numbers and our own names, so that nothing in it can end its element
        "classes": CLASSES,
        "kinds": [token.kind for token in routes.head],
        "rows": [row.shape[1] for row in routes.head_choices],
        "experts": choices.reshape(layers, -1).tolist(),
        # In percent: a reader compares them, and nothing is computed from them.
        "weights": np.round(100 * weights).astype(int).reshape(layers, -1).tolist(),
        "topK": routes.top_k,
        "load": [[round(float(value), 2) for value in each.load] for each in routes.layers],
    }
    return (
        note_html(
            "Every token has the colour of its first expert in the chosen layer. Point at a token, or move to it by "
            f"the arrow keys, for its experts in every layer; a number or Enter shows one expert alone.{cut}"
        )
        + f'<div class="controls"><label>Colours of <select id="layer">{options}</select></label>'
        f'<span id="told" aria-live="polite"></span></div>'
        f'<div class="chips" id="chips" role="group" aria-label="show one expert alone">{chips}</div>'
        f'<pre class="routed" id="text" tabindex="0" role="group" aria-label="the text by expert">{spans}</pre>'
        '<div class="detail" id="detail" aria-live="polite"><p>No token is chosen.</p></div>'
        f'<script type="application/json" id="data">{json.dumps(data, separators=(",", ":"))}</script>'
    )


def token_html(text: str) -> str:
    """A token's characters: ends of lines are marked, what has no text shows a ring, control characters pictures."""
    cut = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
    safe = "".join(c if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127) else "�" for c in cut.replace("\r\n", "\n"))
    marked = escape(safe.replace("\r", "\n")).replace("\n", "<i></i>\n")
    return marked or '<i class="none"></i>'


def palette(experts: int) -> str:
    """CSS of the experts' colours: eight hues apart as far as can be, then those between them in another lightness."""
    return "\n".join(
        f".e{e}{{background:oklch(var(--tone{e // 8 % 3}) {(20 + e % 8 * 45 + e // 8 * 22.5) % 360:g})}}"
        for e in range(experts)
    )


# The maps


def cells(layer: LayerRoutes) -> list[int]:
    """The experts that the maps of a layer show."""
    most = np.argsort(-layer.counts, kind="stable")[:MAPPED_EXPERTS]
    return sorted(most.tolist())


def marks(names: Sequence[int]) -> dict[float, str]:
    """The labels of columns that are experts: as many of them as a narrow page has room for."""
    every = -(-len(names) // 10)
    return {i + 0.5: str(name) for i, name in enumerate(names) if i % every == 0}


def load_html(routes: Routes) -> str:
    """All layers by all experts, and the figures of each layer."""
    loads = [layer.load for layer in routes.layers]
    columns = [[float(load[e]) for load in loads] for e in range(routes.experts)]
    every = max(1, len(loads) // 16)
    names = {i: str(i) for i in range(0, len(loads), every)}
    text = f"load of {routes.experts} experts in {len(loads)} layers: {min(map(min, loads)):.2f} to "
    text += f"{max(map(max, loads)):.2f} times the mean"
    height = max(48, min(480, 24 * len(loads)))
    grid = heat_grid(
        "Tokens of every expert",
        "layer by expert",
        columns,
        names,
        marks(range(routes.experts)),
        text,
        "expert",
        height,
    )
    head, rows = layer_rows(routes)
    return (
        grid
        + color_bar()
        + table_html(Table(head, rows), "layers")
        + note_html(
            "Entropy in nats and confidence, the largest probability, are of the router's distribution over all "
            "experts, on average. Class and position tell so much of the entropy of the expert that a token goes to. "
            "Next again: the share of a token's experts that the next token chooses too; by chance, as many as the "
            "loads alone explain."
        )
    )  # fmt: skip


def maps(routes: Routes, layers: Sequence[int], what: str, of: str, draw: Callable[[int, LayerRoutes], str]) -> str:
    """A figure for each of the layers, and the colours that they share."""
    figures = "".join(draw(number, routes.layers[number]) for number in layers)
    return f'<div class="maps">{figures}</div>{color_bar(what, of)}'


def grid_by(table: np.ndarray, names: Sequence[str], number: int, layer: LayerRoutes, gutter: float) -> str:
    """How much oftener the tokens of each kind, counted in (kinds, E), go to each expert than all tokens do."""
    experts, kept = cells(layer), np.flatnonzero(table.sum(1))
    ratios = measures.lift(table)[kept]
    columns = [ratios[:, e].tolist() for e in experts]
    rows = {i: names[kind] for i, kind in enumerate(kept)}
    i, e = np.unravel_index(np.argmax(ratios[:, experts]), (len(kept), len(experts)))
    text = f"layer {number}: most above its share, {names[kept[i]]} goes {ratios[i, experts[e]]:.1f} times as often to "
    text += f"expert {experts[e]}"
    return heat_grid(f"Layer {number}", "", columns, rows, marks(experts), text, "expert", 20 * len(kept), gutter)


def class_html(routes: Routes, layers: Sequence[int], note: str) -> str:
    text = "How much oftener the tokens of a class go to an expert than all tokens do. A class is told by the token's "
    text += f"own text and the characters beside it.{note}"
    counts = ", ".join(f"{name} {routes.kinds[i]:,}" for i, name in enumerate(CLASSES) if routes.kinds[i])
    return note_html(f"{text} Tokens: {counts}.") + maps(
        routes, layers, "times as often as all tokens", "how much oftener a class goes to an expert",
        lambda number, layer: grid_by(layer.by_class, CLASSES, number, layer, 5.5),
    )  # fmt: skip


def position_html(routes: Routes, layers: Sequence[int], note: str) -> str:
    spans = [span_name(i) for i in range(routes.layers[0].spans)]
    text = "The same by the place of a token in its row, which begins with nothing before it. Early places have few "
    return note_html(f"{text}tokens, so their cells are noisy.{note}") + maps(
        routes, layers, "times as often as all tokens", "how much oftener a span of positions goes to an expert",
        lambda number, layer: grid_by(layer.by_position, spans, number, layer, 5),
    )  # fmt: skip


def pairs_html(routes: Routes, layers: Sequence[int], note: str) -> str:
    if routes.top_k == 1:
        return note_html("A token goes to one expert, so there are no pairs.")

    def draw(number: int, layer: LayerRoutes) -> str:
        experts = cells(layer)
        ratios = measures.pair_ratio(layer.pairs, layer.top_k)[np.ix_(experts, experts)]
        a, b = np.unravel_index(np.argmax(ratios), ratios.shape)
        text = f"layer {number}, pairs of experts: experts {experts[a]} and {experts[b]} together {ratios[a, b]:.1f} "
        rows = {i: str(expert) for i, expert in enumerate(experts) if i % max(1, len(experts) // 16) == 0}
        height = max(120, min(352, 16 * len(experts)))
        return heat_grid(
            f"Layer {number}", "expert by expert", ratios.T.tolist(), rows, marks(experts),
            f"{text}times as often as their loads explain", "expert", height,
        )  # fmt: skip

    text = "How much oftener a token chooses both experts of a pair than it would if only their loads counted."
    return note_html(text + note) + maps(
        routes, layers, "times as often as by load alone", "how much oftener a pair of experts is chosen", draw
    )


def window_html(routes: Routes) -> str:
    """Distinct experts of consecutive tokens: a chart, and the numbers behind it."""
    windows = list(measures.WINDOWS)
    uniform = measures.distinct_if_uniform(routes.experts, routes.top_k)
    lines = [
        Line("every expert as likely", "var(--muted)", [(0, 0.0), *zip(windows, uniform, strict=True)], dashed=True)
    ]
    for i, layer in enumerate(routes.layers):
        points = [(window, value) for window, value in zip(windows, layer.distinct, strict=True) if value is not None]
        lines.append(layer_line(i, len(routes.layers), points))
    head, rows = window_rows(routes)
    return (
        note_html(
            "A step that verifies several guessed tokens reads the weights of every expert that one of them chose. The "
            "fewer distinct experts neighbours choose, the cheaper the step."
        )
        + line_chart("Distinct experts", "of as many consecutive tokens, mean", lines, floor=0, height=260, legend=True,
                     along="tokens")
        + f"<details><summary>Numbers</summary>{table_html(Table(head, rows), 'distinct experts')}"
        + note_html("If independent: tokens that choose each expert as often as in this layer, without regard to the "
                    "token before.")
        + "</details>"
    )  # fmt: skip


def expert_html(routes: Routes, layers: Sequence[int], note: str) -> str:
    """The characteristic tokens of each expert, a table behind a fold for each layer."""
    parts = []
    for number in layers:
        table = Table(["expert", "load", "class", "tokens"], expert_rows(routes, routes.layers[number]))
        opened = " open" if number == told_best(routes) or len(layers) == 1 else ""
        parts.append(
            f'<details{opened}><summary>Layer {number}</summary><div class="texts">'
            f"{table_html(table, f'experts of layer {number}')}</div></details>"
        )
    text = "The class and the tokens that come to an expert oftenest above their share of all tokens."
    return note_html(text + note) + "".join(parts)
