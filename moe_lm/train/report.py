"""What a run ends with: report.md for the terminal, and what it shares with report.html (`page.py`)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moe_lm.checkpoint.directory import replace_file
from moe_lm.config import RunConfig
from moe_lm.scaling.html import Table, Tile
from moe_lm.toml import to_toml
from moe_lm.train.charts import smooth, thin
from moe_lm.train.metrics import read_metrics
from moe_lm.train.starvation import named_in

MOST_STARVED = 12
"""Starvations of a model that the report spells out."""


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


def write_report(run_dir: Path, config: RunConfig, facts: RunFacts) -> tuple[Path, Path]:
    """Write report.md and report.html into `run_dir`, with the metrics of the run and of its draft if there is one."""
    from moe_lm.train.page import page  # which is made of this module's tables and texts

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
    # Of a draft that is distilled all the way: lines from before a resume may lack it.
    acceptance = smooth([line["acceptance"] for line in lines]) if all("acceptance" in line for line in lines) else None
    last = len(lines) - 1
    kept = [i for i, line in enumerate(lines) if i in (0, last) or "val_bits_per_byte" in line]
    rows = []
    for i in thin(kept, 12):
        line = lines[i]
        held_out = f"{line['val_bits_per_byte']:.3f}" if "val_bits_per_byte" in line else ""
        row = [f"{line['step']:,}", f"{line['tokens']:,}", f"{loss[i]:.3f}", f"{bits[i]:.3f}", held_out]
        rows.append([*row, f"{acceptance[i]:.1%}"] if acceptance else row)
    header = ["step", "tokens", "loss, nats per token", "bits per byte", "held-out bits per byte"]
    return Table([*header, "acceptance"] if acceptance else header, rows)


def warnings(facts: RunFacts, logs: Logs) -> tuple[str, ...]:
    """Those of the run, and every expert that starved while it trained, the first dozen of each model."""
    found = list(facts.warnings)
    for log, lines in logs.items():
        starved = named_in(lines)
        for row in starved[:MOST_STARVED]:
            load = lines[-1]["expert_load"][row.layer]
            now = load[row.expert] * len(load)
            end = f" At step {lines[-1]['step']:,} it got {now:.2f} times its even share."
            found.append(f"In the {log}, {row}.{end}")
        if len(starved) > MOST_STARVED:
            found.append(f"In the {log}, experts starved {len(starved) - MOST_STARVED} times more.")
    return tuple(found)


def experts_table(line: dict[str, Any]) -> Table:
    """How the batch of one step spread over the experts of each layer; loads are relative to uniform.

    Lines of older versions know neither confidence nor drops; a bias is there only where the run balances by it.
    """
    load = line["expert_load"]
    relative = [[share * len(layer) for share in layer] for layer in load]
    columns = {
        "least load": [f"{min(layer):.2f}" for layer in relative],
        "most load": [f"{max(layer):.2f}" for layer in relative],
        "dead": [str(layer.count(0)) for layer in load],
        "router entropy, nats": [f"{value:.3f}" for value in line["router_entropy"]],
    }
    if "router_confidence" in line:
        columns["confidence"] = [f"{value:.1%}" for value in line["router_confidence"]]
    if any(line.get("drop_rate", ())):
        columns["dropped"] = [f"{value:.1%}" for value in line["drop_rate"]]
    if "expert_bias" in line:
        columns["bias"] = [f"{min(bias):+.3f} to {max(bias):+.3f}" for bias in line["expert_bias"]]
    rows = zip(*columns.values(), strict=True)
    return Table(["", *columns], [[f"layer {layer}", *row] for layer, row in enumerate(rows)])


def experts_text(lines: list[dict[str, Any]]) -> str:
    """What the experts' table is about."""
    last = lines[-1]
    experts = len(last["expert_load"][0])
    text = (
        f"Load of the {experts} experts at step {last['step']:,}, relative to uniform; dead experts got no token of "
        f"that batch. A router that does not choose has an entropy of ln {experts} = {math.log(experts):.3f} nats."
    )
    if "router_confidence" in last:
        text += " Confidence is the largest probability, on average."
    if any(last.get("drop_rate", ())):
        text += " Dropped choices found their expert full."
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
    parts += [f"> **Warning:** {plain(warning)}" for warning in warnings(facts, logs)]
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
