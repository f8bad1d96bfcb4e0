"""Charts for the report, as HTML that needs no script.

The drawing is an SVG that stretches to its box; every label is HTML laid over it. So a chart fills a wide page and a
phone alike and its text never shrinks. Colours are CSS variables of the page, one set for light and one for dark.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

Points = Sequence[tuple[float, float]]

MAX_POINTS = 800
"""Points of a drawn line: about one per pixel of the page's width."""
MAX_BINS, MIN_BINS, MAX_CELLS = 120, 24, 60_000
"""Columns of a heat map, fewer where all maps together would exceed MAX_CELLS (some 10 bytes each)."""
OCTAVES, LEVELS_PER_OCTAVE = 2, 4
"""Loads are coloured from 2**-OCTAVES to 2**OCTAVES times uniform."""
NEUTRAL = OCTAVES * LEVELS_PER_OCTAVE


@dataclass(frozen=True)
class Line:
    """One line of a chart, its raw values behind it and single measurements on it."""

    name: str
    color: str
    points: Points
    raw: Points = ()
    dots: Points = ()
    dashed: bool = False
    key: bool = True
    """Whether the legend names it."""


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a twentieth of the values, centred; narrower at the start, where a loss falls fast."""
    total = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(len(values) // 40, i)
        stop = min(len(values), i + reach + 1)
        means.append((total[stop] - total[i - reach]) / (stop - i + reach))
    return means


def thin(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, in about `most` steps."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.002, 1.5, 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    floor: float | None = None,
    height: int = 160,
    legend: bool = False,
    form: Callable[[float], str] = short,
    along: str = "step",
) -> str:
    """A figure of lines along an axis from 0. `floor` is where the y axis starts; by default just below the data."""
    values = [y for line in lines for points in (line.points, line.raw, line.dots) for _, y in points]
    ys = ticks(min(values) if floor is None else floor, max(values), 5 if height > 200 else 3)
    width = max(x for line in lines for points in (line.points, line.dots) for x, _ in points)
    xs = [x for x in ticks(0, width, 5) if x <= width and x == int(x)]

    def place(x: float, y: float) -> tuple[float, float]:
        return x / width * 1000, (ys[-1] - y) / (ys[-1] - ys[0]) * 1000

    def path(points: Points, color: str, kind: str) -> str:
        where = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in thin(points, MAX_POINTS)))
        alone = ""
        if len(points) == 1:  # with round caps a line of no length is a dot
            alone, kind = "h0", f"{kind} alone"
        return f'<path class="{kind}" style="stroke:{color}" d="M{where}{alone}"/>' if points else ""

    drawn = [f'<path class="grid" d="M0 {place(0, y)[1]:.1f}H1000"/>' for y in ys]
    drawn += [path(line.raw, line.color, "raw") for line in lines]
    drawn += [path(line.points, line.color, "dashed" if line.dashed else "line") for line in lines]
    for line in lines:
        for x, y in line.dots:
            where = "M{:.1f} {:.1f}h0".format(*place(x, y))
            hint = f"<title>{escape(line.name)}, {along} {x:,.0f}: {y:.3f}</title>"
            drawn.append(f'<path class="halo" d="{where}"/>')
            drawn.append(f'<path class="dot" style="stroke:{line.color}" d="{where}">{hint}</path>')
    labels = [f'<span class="y" style="top:{place(0, y)[1] / 10:.2f}%">{form(y)}</span>' for y in ys]
    labels += [f'<span class="x" style="left:{place(x, 0)[0] / 10:.2f}%">{short(x)}</span>' for x in xs]
    text = "; ".join(
        f"{line.name} from {line.points[0][1]:.4g} at {along} {line.points[0][0]:,.0f} "
        f"to {line.points[-1][1]:.4g} at {along} {line.points[-1][0]:,.0f}"
        for line in lines
        if not line.dashed
    )
    keys = "".join(
        f'<li><i style="border-top:{style} {line.color}"></i>{escape(line.name)}</li>'
        for line, style in ((line, "2px dashed" if line.dashed else "3px solid") for line in lines)
        if line.key
    )
    caption = f"<strong>{escape(title)}</strong> <small>{escape(unit)}</small>"
    return (
        f"<figure><figcaption>{caption}{f'<ul>{keys}</ul>' if legend else ''}</figcaption>"
        + frame(f"{title}, {unit}: {text}", height, "0 0 1000 1000", drawn, labels, along)
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def layer_line(layer: int, layers: int, points: Points) -> Line:
    """The line of one of several layers, from light for the first to dark; of many only the ends are in the legend."""
    share = 100 * layer / max(1, layers - 1)
    color = f"color-mix(in oklab,var(--last) {share:.0f}%,var(--first))"
    return Line(f"layer {layer}", color, points, key=layers <= 12 or layer in (0, layers - 1))


def frame(
    label: str, height: int, view: str, drawn: Sequence[str], labels: Sequence[str], along: str, gutter: float = 0
) -> str:
    """The box of a chart: a stretched drawing, and labels placed over it in percent; `along` names the x axis.

    `gutter` is the room for the labels of rows in rem, if more than usual is needed.
    """
    left = f' style="padding-left:{gutter:g}rem"' if gutter else ""
    return (
        f'<div class="frame" role="img" aria-label="{escape(label)}"{left}><div class="plot" style="height:{height}px">'
        f'<svg viewBox="{view}" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>{"".join(labels)}'
        f'</div><span class="steps">{escape(along)}</span></div>'
    )


def level(relative: float) -> int:
    """The colour of a load relative to uniform: NEUTRAL at 1, logarithmic, 0 for the least."""
    if relative <= 0:
        return 0
    return max(0, min(2 * NEUTRAL, NEUTRAL + round(math.log2(relative) * LEVELS_PER_OCTAVE)))


def heat_maps(steps: Sequence[int], loads: Sequence[Sequence[Sequence[float]]]) -> str:
    """One heat map per layer of `loads[line][layer][expert]`, each expert's share of the slots, and the colour bar."""
    layers, experts = len(loads[0]), len(loads[0][0])
    bins = min(len(loads), MAX_BINS, max(MIN_BINS, MAX_CELLS // (layers * experts)))
    edges = [i * len(loads) // bins for i in range(bins + 1)]
    maps = []
    for layer in range(layers):
        columns = [
            [sum(shares) / len(shares) * experts for shares in zip(*(load[layer] for load in loads[a:b]), strict=True)]
            for a, b in pairwise(edges)
        ]
        maps.append(heat_map(layer, steps, columns))
    return f'<div class="maps">{"".join(maps)}</div>{color_bar()}'


def heat_map(layer: int, steps: Sequence[int], columns: Sequence[Sequence[float]]) -> str:
    """Load relative to uniform of one layer's experts: a column per bin of steps, a row per expert."""
    experts, bins = len(columns[0]), len(columns)
    rows = {row: str(row) for row in sorted({0, experts // 2, experts - 1})}
    ends = {0.0: steps[0], bins: steps[-1]} if len(steps) > 1 else {bins / 2: steps[0]}
    text = f"layer {layer}, load of each expert over training: at the end {min(columns[-1]):.2f} to "
    text += f"{max(columns[-1]):.2f} times uniform"
    marks = {place: short(step) for place, step in ends.items()}
    return heat_grid(f"Layer {layer}", "expert", columns, rows, marks, text, "step", max(84, min(256, experts * 8)))


def heat_grid(
    title: str,
    unit: str,
    columns: Sequence[Sequence[float]],
    rows: Mapping[int, str],
    marks: Mapping[float, str],
    text: str,
    along: str,
    height: int,
    gutter: float = 0,
) -> str:
    """A figure of cells columns[x][y], each a multiple of what was to be expected, coloured as `level` says.

    `rows` are the labels of rows by number, `marks` those of places on the x axis, in columns; `text` is what a reader
    hears who does not see it, `height` is in pixels and `gutter` as in `frame`.
    """
    cells = defaultdict(list)
    bins, lines = len(columns), len(columns[0])
    for y in range(lines):
        row = [level(column[y]) for column in columns]
        start = 0
        for x in range(1, bins + 1):
            if x == bins or row[x] != row[start]:
                cells[row[start]].append(f"M{start} {y}h{x - start}v1h-{x - start}z")
                start = x
    cells.pop(NEUTRAL, None)
    drawn = [f'<path class="h{NEUTRAL}" d="M0 0h{bins}v{lines}h-{bins}z"/>']
    drawn += [f'<path class="h{shade}" d="{"".join(runs)}"/>' for shade, runs in sorted(cells.items())]
    labels = [
        f'<span class="y" style="top:{(row + 0.5) / lines * 100:.2f}%">{escape(name)}</span>'
        for row, name in rows.items()
    ]
    labels += [
        f'<span class="x" style="left:{place / bins * 100:g}%">{escape(name)}</span>' for place, name in marks.items()
    ]
    many = " many" if len(marks) > 2 else ""  # then there is no room between them for the name of the axis
    caption = f"<strong>{escape(title)}</strong> <small>{escape(unit)}</small>"
    return (
        f'<figure class="heat{many}"><figcaption>{caption}</figcaption>'
        + frame(text, height, f"0 0 {bins} {lines}", drawn, labels, along, gutter)
        + "</figure>"
    )


def color_bar(what: str = "load relative to uniform", of: str = "load of an expert relative to uniform") -> str:
    """The scale that all heat maps share: `what` they show, and `of` the same for a reader who does not see them."""
    shades = "".join(f'<path class="h{i}" d="M{i} 0h1v1h-1z"/>' for i in range(2 * NEUTRAL + 1))
    names = {-2: "≤ ¼×", -1: "½×", 0: "1×", 1: "2×", 2: "≥ 4×"}
    marks = [
        (names[octave], ((octave + OCTAVES) * LEVELS_PER_OCTAVE + 0.5) / (2 * NEUTRAL + 1) * 100)
        for octave in range(-OCTAVES, OCTAVES + 1)
    ]
    labels = "".join(f'<span class="x" style="left:{left:.2f}%">{name}</span>' for name, left in marks)
    return (
        f'<div class="bar" role="img" aria-label="colour scale: {escape(of)}, from a quarter or less '
        f'to four times or more"><div class="plot"><svg viewBox="0 0 {2 * NEUTRAL + 1} 1" '
        f'preserveAspectRatio="none" aria-hidden="true">{shades}</svg>{labels}</div>'
        f"<span>{escape(what)}</span></div>"
    )


def heat_colors() -> str:
    """CSS of the heat maps: from --low through --even to --high."""
    rules = []
    for i in range(2 * NEUTRAL + 1):
        end, share = ("--low" if i < NEUTRAL else "--high"), abs(i - NEUTRAL) / NEUTRAL * 100
        rules.append(f".h{i}{{fill:color-mix(in oklab,var({end}) {share:g}%,var(--even))}}")
    return "\n".join(rules)


CHART_STYLE = f"""
figure {{ margin: 1.5rem 0 0; min-width: 0; }}
figcaption {{ margin-bottom: .6rem; line-height: 1.4; }}
figcaption strong {{ font-weight: 600; }}
figcaption ul {{ list-style: none; margin: .15rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.1rem;
  font-size: .8125rem; color: var(--muted); }}
figcaption i {{ display: inline-block; width: 1rem; margin-right: .4rem; vertical-align: middle; }}
.frame {{ position: relative; padding: 0 1.1rem 2.2rem 2.9rem; }}
.heat .frame {{ padding-left: 1.9rem; }}
.plot {{ position: relative; }}
.plot svg {{ position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }}
.plot span, .steps {{ position: absolute; font-size: .75rem; line-height: 1; color: var(--muted); white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
.plot .y {{ right: 100%; margin-right: .5rem; transform: translateY(-50%); }}
.plot .x {{ top: 100%; margin-top: .45rem; transform: translateX(-50%); }}
.steps {{ right: 1.1rem; bottom: .1rem; }}
.heat .steps {{ right: 50%; bottom: 1rem; }}
.many .steps {{ right: 1.1rem; bottom: .1rem; }}
svg path {{ fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }}
.grid {{ stroke: var(--rule); stroke-width: 1; }}
.line {{ stroke-width: 2; }}
.dashed {{ stroke-width: 1.25; stroke-dasharray: 4 4; }}
.raw {{ stroke-width: 1; stroke-opacity: .28; }}
.halo {{ stroke: var(--paper); stroke-width: 11; }}
.dot {{ stroke-width: 7; }}
.alone {{ stroke-width: 5; }}
.heat svg path, .bar svg path {{ shape-rendering: crispEdges; }}
.small, .maps {{ display: grid; gap: 0 1.5rem; }}
.small {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }}
.maps {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
.bar {{ max-width: 26rem; margin: 1rem auto 0; padding: 0 1.5rem; text-align: center; font-size: .75rem;
  color: var(--muted); }}
.bar .plot {{ height: 10px; margin-bottom: 1.5rem; }}
{heat_colors()}
"""
