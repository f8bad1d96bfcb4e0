"""`--html`: a plan on one page. What it shows is handed in as sections, each made from what the planner computed."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moe_lm.scaling.counts import Parameters
from moe_lm.scaling.frontier import FrontierPoint, SweepRow
from moe_lm.scaling.html import Table, Tile, document, section, table_html, tiles_html
from moe_lm.scaling.memory import StageMemory
from moe_lm.scaling.training import StepTime
from moe_lm.scaling.validate import BARS, Validation

GB = 1e9


def plan_page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Mapping[str, str]) -> str:
    """The whole page: `sections` by their headings, in order, each of them HTML as the functions below make it."""
    body = [f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>", tiles_html(tiles)]
    body += [section(heading, content) for heading, content in sections.items()]
    return document(f"{title}: plan", BAR_STYLE, body)


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def parameters_html(counts: Parameters) -> str:
    """Weights by component, with those that one token uses."""
    rows = []
    for name, number in vars(counts).items():
        if number and name != "active_experts":
            used = counts.active_experts if name == "experts" else number
            share = number / counts.total
            rows.append((name.replace("_", " "), f"{number:,}", f"{share:.2%}", f"{used:,}"))
    rows.append(("total", f"{counts.total:,}", "100%", f"{counts.active:,}"))
    return table_html(Table(("component", "parameters", "share", "used per token"), rows), "parameters")


def memory_html(stages: Sequence[StageMemory]) -> str:
    """GB on a GPU of each pipeline stage, from 0: bars up to the limit, and figures; equal stages in one row."""
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers", "overhead")
    groups: list[tuple[int, int, StageMemory]] = []
    for i, stage in enumerate(stages):
        if groups and groups[-1][2] == stage:
            groups[-1] = (groups[-1][0], i, stage)
        else:
            groups.append((i, i, stage))
    names = [f"stage {first}" if first == last else f"stages {first}-{last}" for first, last, _ in groups]
    bars = {
        name: {kind: getattr(stage, kind) / GB for kind in kinds}
        for name, (_, _, stage) in zip(names, groups, strict=True)
    }
    limit = stages[0].limit / GB
    rows = [
        (name, *(f"{value:.1f}" for value in parts.values()), f"{sum(parts.values()):.1f}",
         "fits" if sum(parts.values()) <= limit else f"{sum(parts.values()) - limit:.1f} too many")
        for name, parts in bars.items()
    ]  # fmt: skip
    table = table_html(Table(("GB per GPU", *kinds, "total", f"limit {limit:.1f}"), rows), "memory per stage")
    return bars_html(bars, "GB", limit) + table


def time_html(step: StepTime) -> str:
    """Seconds of an optimizer step, a bar for each part of it."""
    parts = {name: seconds for name, seconds in step.parts.items() if seconds > 0}
    bars = {f"{name.replace('_', ' ')}, {seconds / step.seconds:.1%}": {"": seconds} for name, seconds in parts.items()}
    return note(f"An optimizer step takes {step.seconds:.3g} s: what its critical path is spent on.") + bars_html(
        bars, "s"
    )


def serving_html(points: Sequence[FrontierPoint]) -> str:
    """The points that nothing beats, fastest first."""
    rows = [
        (f"tp {p.plan.tp} x pp {p.plan.pp}" + (f" x ep {p.plan.ep}" if p.plan.ep > 1 else ""), f"{p.gpus:,}",
         f"{p.plan.batch:,}", f"{1e3 * p.first_token:,.0f}", f"{1e3 * p.per_token:,.1f}", f"{p.tokens_per_s:,.0f}",
         f"{p.tokens_per_s_per_gpu:,.1f}", f"{p.price:.4f}")
        for p in points if p.best
    ]  # fmt: skip
    head = ("layout", "GPUs", "batch", "first token, ms", "per token, ms", "tokens/s", "per GPU", "$ per 1k tokens")
    return table_html(Table(head, rows), "serving: latency against price")


def sweep_html(rows: Sequence[SweepRow]) -> str:
    """Tokens/s of all requests by their number and context; what memory does not hold is in brackets."""
    contexts = sorted({row.context for row in rows})
    found = {(row.batch, row.context): row for row in rows}
    lines = []
    for batch in sorted({row.batch for row in rows}):
        cells = [found[batch, context] for context in contexts]
        rates = [f"{cell.tokens_per_s:,.0f}" for cell in cells]
        shown = [rate if cell.fits else f"({rate})" for rate, cell in zip(rates, cells, strict=True)]
        lines.append((f"{batch:,}", *shown))
    head = ("batch", *(f"{context:,} tokens of context" for context in contexts))
    return note("Tokens/s of all requests together. In brackets: memory does not hold it.") + table_html(
        Table(head, lines), "decode rate by batch and context"
    )


def facts_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `--facts`: id, reported, computed, difference, verdict and derivation."""
    keys = ("id", "claim", "reported", "computed", "unit", "difference", "verdict", "derivation")
    lines = [tuple(cell(row.get(key, "")) for key in keys) for row in rows]
    text = "What is publicly reported of GPT-4 is unconfirmed. Where the reports contradict themselves it is said."
    return note(text) + f'<div class="prose">{table_html(Table(keys, lines), "facts")}</div>'


def cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)


def validation_html(found: Validation) -> str:
    """Errors by sort and by family, as fitted and with the family left out, and every run behind a fold."""
    lines = []
    for sort, bar in BARS.items():
        families = dict.fromkeys(row.run.family for row in found.rows if row.sort == sort)
        for family in (None, *families):
            fitted, left_out = (found.errors(sort, left, family) for left in (False, True))
            if fitted is None or left_out is None:
                continue
            name = family or f"all {sort} runs, bar {bar:.0%}: {'pass' if found.passes(sort) else 'miss'}"
            lines.append((name, f"{fitted.runs}", f"{fitted.median:.1%}", f"{left_out.median:.1%}",
                          f"{left_out.low:.1%} to {left_out.high:.1%}"))  # fmt: skip
    head = ("family", "runs", "median error, fitted", "unfitted", "quartiles, unfitted")
    runs = [
        (row.run.name, f"{row.run.measured:,.4g}", row.run.unit, f"{row.predicted / row.run.measured:.2f}",
         "" if row.left_out is None else f"{row.left_out / row.run.measured:.2f}", row.run.source)
        for row in found.rows
    ]  # fmt: skip
    every = Table(("run", "measured", "unit", "predicted / measured", "unfitted", "source"), runs)
    text = "Predicted against published measurements. Unfitted: constants found again without the run's own family."
    return (
        note(text)
        + table_html(Table(head, lines), "validation by family")
        + f'<details><summary>Every run</summary><div class="prose">{table_html(every, "every run")}</div></details>'
    )


def picture_html(png: bytes, label: str) -> str:
    """A picture of moe_lm.scaling.plots inside the page."""
    return f'<img class="picture" alt="{escape(label)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def bars_html(rows: Mapping[str, Mapping[str, float]], unit: str, limit: float | None = None) -> str:
    """A stacked bar for each row, of its parts by name, under one key (`""` has none); a line stands at `limit`."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    widest = max(max(sum(parts.values()) for parts in rows.values()), limit or 0.0)
    keys = "".join(f'<li><i class="c{i % 8}"></i>{escape(name)}</li>' for i, name in enumerate(names) if name)
    lines = []
    for label, parts in rows.items():
        drawn = "".join(
            f'<i class="c{names.index(name) % 8}" style="width:{100 * value / widest:.3f}%" '
            f'title="{escape(name or label)}: {value:.3g} {escape(unit)}"></i>'
            for name, value in parts.items()
        )
        mark = f'<b style="left:{100 * limit / widest:.3f}%"></b>' if limit else ""
        total = f"{sum(parts.values()):.4g} {unit}"
        text = f"{label}: {total}" + "".join(f"; {name} {value:.3g}" for name, value in parts.items() if name)
        lines.append(
            f'<div class="row" role="img" aria-label="{escape(text)}"><span>{escape(label)}</span>'
            f'<div class="track">{drawn}{mark}</div><span>{escape(total)}</span></div>'
        )
    end = f'<li><i class="mark"></i>limit, {limit:.1f} {escape(unit)}</li>' if limit else ""
    return f'<figure class="bars"><figcaption><ul>{keys}{end}</ul></figcaption>{"".join(lines)}</figure>'


BAR_STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --c6: #6b6b6b;
  --c7: #8c564b; }
.bars { margin: 1.25rem 0 0; }
.bars ul { list-style: none; margin: 0 0 .6rem; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem;
  font-size: .8125rem; color: var(--muted); }
.bars li i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border-radius: 2px; }
.bars li .mark { width: 2px; border-radius: 0; background: var(--ink); vertical-align: middle; }
.row { display: grid; grid-template-columns: 10rem 1fr 5.5rem; gap: 0 .8rem; align-items: center; margin: .3rem 0;
  font-size: .8125rem; font-variant-numeric: tabular-nums; }
.track { position: relative; display: flex; height: 1.25rem; background: var(--panel); border-radius: 3px; }
.track i { height: 100%; box-shadow: inset -1px 0 var(--paper); }
.track b { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.c3 { background: var(--c3); } .c4 { background: var(--c4); } .c5 { background: var(--c5); }
.c6 { background: var(--c6); } .c7 { background: var(--c7); }
.picture { display: block; width: 100%; height: auto; margin-top: 1.25rem; background: white; border-radius: 6px; }
.prose td:last-child { white-space: normal; min-width: 22rem; text-align: left; }
@media (max-width: 34rem) { .row { grid-template-columns: 1fr auto; }
  .track { grid-column: 1 / -1; grid-row: 2; } }
"""
