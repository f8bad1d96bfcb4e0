"""report.html: one file with the charts, without scripts, readable in light and dark and on a phone."""

import math
from html import escape
from typing import Any

from moe_lm.config import RunConfig
from moe_lm.toml import to_toml
from moe_lm.train.charts import CHART_STYLE, Line, heat_maps, line_chart, smooth
from moe_lm.train.report import (
    Logs,
    RunFacts,
    Sample,
    Table,
    experts_table,
    experts_text,
    models_table,
    progress_table,
    provenance,
    sampling_text,
    shape,
    speculation_table,
    speculation_text,
    tiles,
)


def page(name: str, config: RunConfig, facts: RunFacts, logs: Logs) -> str:
    """The whole of report.html."""
    body = [f"<header><h1>{escape(name)}</h1><p>{escape(shape(config))}</p></header>"]
    if facts.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in facts.warnings)
        body.append(f'<aside class="warnings" aria-label="warnings"><h2>Warnings</h2><ul>{items}</ul></aside>')
    figures = "".join(
        f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}<small>{escape(tile.note)}</small></dd></div>"
        for tile in tiles(facts, logs)
    )
    body.append(f'<dl class="tiles">{figures}</dl>')
    body.append(section("Training", training_charts(logs)))
    for log, lines in logs.items():
        if lines[-1]["expert_load"]:
            body.append(section("Experts" if log == "model" else f"Experts of the {log}", expert_charts(lines)))
    if facts.samples:
        samples = "".join(map(sample_html, facts.samples))
        intro = f'{escape(sampling_text(config))} The prompt is in <b class="prompt">colour</b>.'
        body.append(section("Samples", f'<p class="note">{intro}</p>{samples}'))
    speculation = f'<p class="note">{escape(speculation_text(config, facts))}</p>'
    if facts.speculation:
        speculation += table_html(speculation_table(facts), "speculative decoding")
    body.append(section("Speculative decoding", speculation))
    rows = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in provenance(facts))
    command = f'<pre tabindex="0" aria-label="command">{escape(facts.command)}</pre>'
    models = table_html(models_table(facts), "models")
    body.append(section("The run", f'{models}{command}<dl class="facts">{rows}</dl>'))
    settings = f'<pre tabindex="0">{escape(to_toml(config))}</pre>'
    body.append(section("Config", f"<details><summary>The resolved config</summary>{settings}</details>"))
    # The policy makes it certain that no sample, whatever it says, is ever more than text.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(name)}: run report</title>
<style>{STYLE}{CHART_STYLE}</style>
</head>
<body>
<main>
{"".join(part + chr(10) for part in body)}</main>
</body>
</html>
"""


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table_html(table: Table, label: str) -> str:
    """A table in a box of its own that scrolls where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def sample_html(sample: Sample) -> str:
    prompt = f'<b class="prompt">{escape(sample.prompt)}</b>' if sample.prompt else '<i class="prompt">(no prompt)</i>'
    return (
        f'<figure class="sample"><pre tabindex="0">{prompt}<span>{escape(sample.text)}</span></pre>'
        f"<figcaption><small>finish reason: {escape(sample.finish_reason)}</small></figcaption></figure>"
    )


def training_charts(logs: Logs) -> str:
    """Loss of both models, their learning rate and speed, and the numbers behind the loss."""
    if not logs:
        return "<p>No step was logged.</p>"

    def lines(key: str, scale: float = 1.0, raw: bool = True, dots: str = "") -> list[Line]:
        drawn = []
        for log, steps in logs.items():
            points = [(line["step"], line[key] * scale) for line in steps if key in line]
            if not points:
                continue
            means = list(zip((x for x, _ in points), smooth([y for _, y in points]), strict=True))
            held_out = [(line["step"], line[dots]) for line in steps if dots in line]
            color = f"var(--{log})"
            drawn.append(Line(log, color, means, points, held_out) if raw else Line(log, color, points))
        return drawn

    loss = lines("bits_per_byte", dots="val_bits_per_byte")
    note = "Line: running mean of training batches. Faint: every logged step. Dots: held-out text."
    speed = "% of measured matrix multiplication"
    small = [
        line_chart("Learning rate", "", lines("learning_rate", raw=False), floor=0),
        line_chart("Speed", "tokens per second", lines("tokens_per_s"), floor=0),
        line_chart("MFU", speed, lines("mfu", 100), floor=0, form=lambda y: f"{y:g}%"),
    ]
    if acceptance := lines("acceptance", 100):
        unit = "% of guesses at temperature 1, on training batches"
        small.append(line_chart("Acceptance", unit, acceptance, floor=0, form=lambda y: f"{y:g}%"))
    numbers = "".join(
        f"<h3>{log.capitalize()}</h3>{table_html(progress_table(steps), f'training of the {log}')}"
        for log, steps in logs.items()
    )
    return (
        line_chart("Loss", "bits per byte", loss, note=note, height=300, legend=True)
        + f'<div class="small">{"".join(small)}</div><details><summary>Numbers</summary>{numbers}</details>'
    )


def expert_charts(lines: list[dict[str, Any]]) -> str:
    """Load over training and at its end, and how decided the routers are."""
    steps, last = [line["step"] for line in lines], lines[-1]
    layers, experts = len(last["expert_load"]), len(last["expert_load"][0])
    most = [(step, math.log(experts)) for step in (0, steps[-1])]
    drawn = [Line(f"uniform, ln {experts}", "var(--muted)", most, dashed=True)]
    for layer in range(layers):
        share = 100 * layer / max(1, layers - 1)
        ends = layers <= 12 or layer in (0, layers - 1)
        color = f"color-mix(in oklab,var(--last) {share:.0f}%,var(--first))"
        means = smooth([line["router_entropy"][layer] for line in lines])
        drawn.append(Line(f"layer {layer}", color, list(zip(steps, means, strict=True)), key=ends))
    entropy = line_chart("Router entropy", "nats, mean over tokens", drawn, height=220, legend=True)
    return (
        heat_maps(steps, [line["expert_load"] for line in lines])
        + f'<p class="note">{escape(experts_text(lines))}</p>'
        + table_html(experts_table(last), "load of the experts")
        + entropy
    )


STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --ink: #1f2328; --muted: #646a72; --rule: #e4e1db;
  --panel: #f4f2ee; --model: #2a6cb0; --draft: #c2611f; --low: #2566a8; --even: #efece6; --high: #bd4a12;
  --first: #9cc3e6; --last: #17406d; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e7e5e0; --muted: #9ba1a9; --rule: #2f3338;
  --panel: #1e2125; --model: #79b2ea; --draft: #f0a05a; --low: #4a93d9; --even: #25292e; --high: #f5905a;
  --first: #3f6b96; --last: #cfe6ff; --warn: #e8b35c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; letter-spacing: -.005em; margin: 0; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 0; }
header p { margin: .4rem 0 0; color: var(--muted); max-width: 44rem; overflow-wrap: anywhere; }
section { margin-top: 3.5rem; border-top: 1px solid var(--rule); padding-top: 1.25rem; }
small { font-size: .8125rem; color: var(--muted); font-weight: 400; }
.note { font-size: .875rem; color: var(--muted); max-width: 44rem; margin: .6rem 0 0; }
.warnings { margin-top: 1.75rem; border-left: 3px solid var(--warn); padding: .1rem 0 .1rem 1rem; }
.warnings h2 { font-size: 1rem; color: var(--warn); }
.warnings ul { margin: .3rem 0 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1.75rem 1.5rem;
  margin: 2.5rem 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .55rem; min-width: 0; }
.tiles dt { font-size: .8125rem; color: var(--muted); overflow-wrap: anywhere; }
.tiles dd { margin: .1rem 0 0; font-size: 1.65rem; line-height: 1.25; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; letter-spacing: 0; line-height: 1.4; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem 0 .4rem 1.4rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; }
pre { margin: 1rem 0 0; padding: .9rem 1.1rem; background: var(--panel); border-radius: 6px; overflow-x: auto;
  font: .8125rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
.prompt { color: var(--model); font-weight: 600; }
.sample figcaption { margin: .3rem 0 0; }
.facts { margin: 1.25rem 0 0; font-size: .9375rem; }
.facts div { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; padding: .3rem 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.25rem; }
summary { cursor: pointer; color: var(--muted); font-size: .9375rem; }
:focus-visible { outline: 2px solid var(--model); outline-offset: 3px; }
@media (max-width: 34rem) { main { padding-top: 1.75rem; } h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.4rem 1.1rem; }
  .tiles dd { font-size: 1.4rem; } .facts div { grid-template-columns: 1fr; } section { margin-top: 2.75rem; } }
"""
