"""What a run ends with: report.md for the terminal, report.html (one file, no scripts) with the charts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moe_lm.checkpoint.directory import replace_file
from moe_lm.config import RunConfig, to_toml
from moe_lm.train.charts import CHART_STYLE, Line, heat_maps, line_chart, smooth, thin
from moe_lm.train.metrics import read_metrics


@dataclass(frozen=True)
class Sample:
    """A prompt and what the trained model made of it."""

    prompt: str
    text: str
    finish_reason: str


@dataclass(frozen=True)
class SpeculationRow:
    """Decoding with and without the draft model, under one way of sampling."""

    sampling: str
    """`greedy`, `temperature 0.7` and the like."""
    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    speedup: float
    acceptance: float
    """Share of the drafted tokens that stood."""
    tokens_per_step: float
    """New tokens per forward pass of the target."""
    accepted_at: tuple[float, ...]
    """Acceptance by position in the draft, of the drafts that stood up to there."""


@dataclass(frozen=True)
class ModelFacts:
    """One trained model in numbers."""

    name: str
    """`model` or `draft`."""
    total_parameters: int
    active_parameters: int
    """Parameters that one token passes through."""
    steps: int
    tokens: int
    seconds: float
    bits_per_byte: float
    """Held out, over all sources."""
    by_source: dict[str, float]


@dataclass(frozen=True)
class RunFacts:
    """What the report says beside the config and the metrics."""

    command: str
    commit: str | None
    hardware: str
    versions: str
    dtype: str
    gemm_gflops: float
    """Measured matrix multiplication in `dtype`: the whole of which MFU is a share."""
    models: tuple[ModelFacts, ...]
    """The model first."""
    samples: tuple[Sample, ...]
    speculation: tuple[SpeculationRow, ...]
    """Empty without a draft."""
    warnings: tuple[str, ...]


class Tile(NamedTuple):
    """A headline figure."""

    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """Rows of text; the first column names the row, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(run_dir: Path, config: RunConfig, facts: RunFacts) -> tuple[Path, Path]:
    """Write report.md and report.html into `run_dir`, with the metrics of the run and of its draft if there is one."""
    logs = {"model": read_metrics(run_dir / "metrics.jsonl"), "draft": read_metrics(run_dir / "draft/metrics.jsonl")}
    logs = {name: lines for name, lines in logs.items() if lines}
    name = run_dir.resolve().name
    paths = run_dir / "report.md", run_dir / "report.html"
    replace_file(paths[0], printable(markdown(name, config, facts, logs)))
    replace_file(paths[1], printable(page(name, config, facts, logs)))
    return paths


Logs = dict[str, list[dict[str, Any]]]


# What both forms say


def printable(text: str) -> str:
    """`text` with control characters as their pictures (␛): a model may write any byte, a terminal obeys some."""
    pictures = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | {0x7F: "␡"}
    pictures |= dict.fromkeys(range(0x80, 0xA0), "�") | dict.fromkeys(range(0xD800, 0xE000), "�")
    return text.translate(pictures)


def duration(seconds: float) -> str:
    """`42.5 s`, `4 min 10 s` or `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def compact(count: float) -> str:
    """`950`, `5.32 M`, `1.76 T`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / min(size, 1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{count:,.0f}"


def gemm_rate(gflops: float) -> str:
    return f"{gflops / 1000:,.1f} TFLOP/s" if gflops >= 10_000 else f"{gflops:,.1f} GFLOP/s"


def shape(config: RunConfig) -> str:
    """The model and its data in one line."""
    model = config.model
    mlp = "dense"
    if model.is_moe:
        shared = f" and {model.n_shared_experts} shared" if model.n_shared_experts else ""
        mlp = f"{model.num_local_experts} experts, {model.num_experts_per_tok} per token{shared}"
    sources = ", ".join(source.path for source in config.data.sources)
    return f"{model.num_hidden_layers} layers of width {model.hidden_size}, {mlp}. Trained on {sources}."


def tiles(facts: RunFacts, logs: Logs) -> list[Tile]:
    """The headline figures."""
    model = facts.models[0]
    found = [Tile("held-out bits per byte", f"{model.bits_per_byte:.3f}", "all sources")]
    if len(model.by_source) > 1:
        found += [Tile(name, f"{value:.3f}", "held-out bits per byte") for name, value in model.by_source.items()]
    found.append(Tile("training time", duration(model.seconds), f"{model.steps:,} steps"))
    active = f"{compact(model.active_parameters)} active per token"
    found.append(Tile("parameters", compact(model.total_parameters), active))
    if lines := logs.get("model"):
        share = median(line["mfu"] for line in lines)
        speed = f"{median(line['tokens_per_s'] for line in lines):,.0f}"
        found.append(Tile("tokens per second", speed, f"training, MFU {share:.0%}"))
    if rows := facts.speculation:
        others = "".join(f"; {row.speedup:.2f}× at {row.sampling}" for row in rows[1:])
        found.append(Tile("speculative speed-up", f"{rows[0].speedup:.2f}×", rows[0].sampling + others))
    return found


def provenance(facts: RunFacts) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    return [
        ("commit", facts.commit or "not known"),
        ("hardware", facts.hardware),
        (
            "arithmetic",
            f"{facts.dtype}, {gemm_rate(facts.gemm_gflops)} in matrix multiplication (MFU is a share of it)",
        ),
        ("versions", facts.versions),
    ]


def models_table(facts: RunFacts) -> Table:
    sources = list(dict.fromkeys(name for model in facts.models for name in model.by_source))
    rows = []
    for model in facts.models:
        counts = [model.total_parameters, model.active_parameters, model.steps, model.tokens]
        scores = [f"{model.by_source[name]:.3f}" if name in model.by_source else "–" for name in sources]
        numbers = [f"{count:,}" for count in counts]
        rows.append([model.name, *numbers, duration(model.seconds), f"{model.bits_per_byte:.3f}", *scores])
    header = ["", "parameters", "active", "steps", "tokens", "time", "bits per byte", *sources]
    return Table(header, rows)


def progress_table(lines: list[dict[str, Any]]) -> Table:
    """The first step, the evaluations and the last, a dozen at most; the training columns are running means."""
    loss, bits = (smooth([line[key] for line in lines]) for key in ("loss", "bits_per_byte"))
    last = len(lines) - 1
    kept = [i for i, line in enumerate(lines) if i in (0, last) or "val_bits_per_byte" in line]
    rows = []
    for i in thin(kept, 12):
        line = lines[i]
        held_out = f"{line['val_bits_per_byte']:.3f}" if "val_bits_per_byte" in line else ""
        rows.append([f"{line['step']:,}", f"{line['tokens']:,}", f"{loss[i]:.3f}", f"{bits[i]:.3f}", held_out])
    return Table(["step", "tokens", "loss, nats per token", "bits per byte", "held-out bits per byte"], rows)


def experts_table(line: dict[str, Any]) -> Table:
    """How the batch of one step spread over the experts of each layer; loads are relative to uniform."""
    rows = []
    for layer, (load, entropy) in enumerate(zip(line["expert_load"], line["router_entropy"], strict=True)):
        relative = [share * len(load) for share in load]
        least, most = f"{min(relative):.2f}", f"{max(relative):.2f}"
        rows.append([f"layer {layer}", least, most, str(load.count(0)), f"{entropy:.3f}"])
    return Table(["", "least load", "most load", "dead", "router entropy, nats"], rows)


def experts_text(lines: list[dict[str, Any]]) -> str:
    """What the experts' table is about."""
    last = lines[-1]
    experts = len(last["expert_load"][0])
    text = (
        f"Load of the {experts} experts at step {last['step']:,}, relative to uniform; dead experts got no token of "
        f"that batch. A router that does not choose has an entropy of ln {experts} = {math.log(experts):.3f} nats."
    )
    counts = [line["val_dead_experts"] for line in lines if "val_dead_experts" in line]
    if not counts:
        return text
    total = experts * len(last["expert_load"])
    return f"{text} Of all {total} experts, {counts[-1] or 'none'} got no token of the held-out text."


def speculation_table(facts: RunFacts) -> Table:
    rows = []
    for row in facts.speculation:
        places = " ".join(f"{share:.0%}" for share in row.accepted_at)
        speeds = [f"{row.plain_tokens_per_s:,.1f}", f"{row.speculative_tokens_per_s:,.1f}", f"{row.speedup:.2f}×"]
        rows.append([row.sampling, *speeds, f"{row.tokens_per_step:.2f}", f"{row.acceptance:.1%}", places])
    header = ["", "plain tokens/s", "with draft", "speed-up", "tokens per step", "accepted", "by place"]
    return Table(header, rows)


def speculation_text(config: RunConfig, facts: RunFacts) -> str:
    if facts.speculation:
        return (
            f"The draft proposes {config.sample.draft_tokens} tokens at a time; the model takes or refuses them in one "
            "forward pass, a step. Accepted is the share of the proposed tokens that stood; by place in the draft, the "
            "share among drafts that stood up to there."
        )
    if len(facts.models) > 1:
        return "The run has a draft model, but speculative decoding was not measured."
    return "This run trained no draft model, so there is no speculative decoding to measure."


def sampling_text(config: RunConfig) -> str:
    temperature = config.sample.temperature
    sampling = f"Temperature {temperature:g}" if temperature else "Greedy"
    return f"{sampling}, at most {config.sample.max_tokens} tokens."


# report.md


def markdown(name: str, config: RunConfig, facts: RunFacts, logs: Logs) -> str:
    """The whole of report.md."""
    parts = [f"# {plain(name)}", plain(shape(config))]
    parts += [f"> **Warning:** {plain(warning)}" for warning in facts.warnings]
    parts.append(markdown_table(Table(["", "", ""], tiles(facts, logs))))
    parts.append(fenced(facts.command, "sh"))
    parts.append("\n".join(f"- {key}: {plain(value)}" for key, value in provenance(facts)))
    parts += ["## Models", markdown_table(models_table(facts)), "## Training", "Charts are in report.html."]
    for log, lines in logs.items():
        parts += [f"The {log}; training columns are running means.", markdown_table(progress_table(lines))]
    if not logs:
        parts.append("No step was logged.")
    for log, lines in logs.items():
        if lines[-1]["expert_load"]:
            parts += [f"## Experts of the {log}", experts_text(lines), markdown_table(experts_table(lines[-1]))]
    if facts.samples:
        parts += ["## Samples", sampling_text(config)]
    for number, sample in enumerate(facts.samples, 1):
        parts += [f"### {number}. Prompt", fenced(sample.prompt)]
        parts += [f"Continuation (finish reason: {plain(sample.finish_reason)})", fenced(sample.text)]
    parts += ["## Speculative decoding", speculation_text(config, facts)]
    if facts.speculation:
        parts.append(markdown_table(speculation_table(facts)))
    parts += ["## Config", "<details><summary>The resolved config</summary>", fenced(to_toml(config), "toml")]
    return "\n\n".join([*parts, "</details>"]) + "\n"


def plain(text: str) -> str:
    """`text` on one line, with what Markdown would read as markup escaped."""
    return re.sub(r"[\\`*\[\]<>|#&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def markdown_table(table: Table) -> str:
    """Columns padded to line up in a terminal; figures to the right."""
    rows = [[plain(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


# report.html


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
            points = [(line["step"], line[key] * scale) for line in steps]
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
