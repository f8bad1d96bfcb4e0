"""report.html: one file with the charts, without scripts, readable in light and dark and on a phone."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

from moe_lm.config import RunConfig
from moe_lm.scaling.html import document, section, table_html, tiles_html
from moe_lm.toml import to_toml
from moe_lm.train.charts import CHART_STYLE, Line, heat_maps, layer_line, line_chart, smooth
from moe_lm.train.report import (
    Logs,
    RunFacts,
    Sample,
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
    warnings,
)


def page(name: str, config: RunConfig, facts: RunFacts, logs: Logs) -> str:
    """The whole of report.html."""
    body = [f"<header><h1>{escape(name)}</h1><p>{escape(shape(config))}</p></header>"]
    if warned := warnings(facts, logs):
        items = "".join(f"<li>{escape(warning)}</li>" for warning in warned)
        body.append(f'<aside class="warnings" aria-label="warnings"><h2>Warnings</h2><ul>{items}</ul></aside>')
    body.append(tiles_html(tiles(facts, logs)))
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
    return document(f"{name}: run report", CHART_STYLE, body)


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
    experts = len(last["expert_load"][0])
    most = [(step, math.log(experts)) for step in (0, steps[-1])]
    uniform = Line(f"uniform, ln {experts}", "var(--muted)", most, dashed=True)
    small = []
    if confidence := by_layer(lines, "router_confidence", 100):
        unit = "largest probability, mean over tokens"
        small.append(line_chart("Router confidence", unit, confidence, floor=0, form=lambda y: f"{y:g}%"))
    if any(any(line.get("drop_rate", ())) for line in lines):
        dropped = by_layer(lines, "drop_rate", 100)
        small.append(line_chart("Dropped", "% of the choices", dropped, floor=0, form=lambda y: f"{y:g}%"))
    if spread := by_layer(lines, "expert_bias", of=lambda bias: max(bias) - min(bias)):
        small.append(line_chart("Range of the bias", "largest less smallest, of a layer", spread, floor=0))
    return (
        heat_maps(steps, [line["expert_load"] for line in lines])
        + f'<p class="note">{escape(experts_text(lines))}</p>'
        + table_html(experts_table(last), "load of the experts")
        + line_chart("Router entropy", "nats, mean over tokens", [uniform, *by_layer(lines, "router_entropy")],
                     height=220, legend=True)
        + (f'<div class="small">{"".join(small)}</div>' if small else "")
    )  # fmt: skip


def by_layer(
    lines: list[dict[str, Any]], key: str, scale: float = 1.0, of: Callable[[Any], float] = float
) -> list[Line]:
    """Running means of `of` of line[key][layer], a line for each layer; none where no step has the key.

    Steps of an older version, before a resume, may lack it.
    """
    logged = [line for line in lines if key in line]
    layers = len(logged[-1][key]) if logged else 0
    drawn = []
    for layer in range(layers):
        means = smooth([scale * of(line[key][layer]) for line in logged])
        points = list(zip((line["step"] for line in logged), means, strict=True))
        drawn.append(layer_line(layer, layers, points))
    return drawn
