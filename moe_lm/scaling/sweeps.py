"""`--sweep`: serving over batches, contexts, layouts, heads, bits and drafts, and how many experts tokens meet."""

from dataclasses import dataclass, replace
from functools import partial

from moe_lm.config import ConfigError, ModelConfig, ServingPlan
from moe_lm.scaling.frontier import FrontierPoint, SweepRow, frontier, sweep
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.memory import serving_memory
from moe_lm.scaling.routing import TRAINED_ROUTER, RoutingRow, load_counts, routing_rows
from moe_lm.scaling.serving_choices import ChoiceRow, bits_rows, head_rows
from moe_lm.scaling.speculation import SpeculationRow, speculation_rows
from moe_lm.scaling.text import dollars, duration, short, size, table

BATCHES = tuple(2**n for n in range(14))
"""Requests that decode together."""
DRAFT_TOKENS = 4
"""Of a draft where the plan has none: what the reports speak of (facts F38)."""
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
"""Chances that a drafted token is accepted, beside the one from which a draft pays."""
TOKENS = (1, 8, 128)
"""Tokens whose distinct experts are counted; 128 is a window of the trained router."""


@dataclass(frozen=True)
class Sweeps:
    """Everything that `--sweep` shows for one kind of GPU."""

    decode: list[SweepRow]
    frontier: list[FrontierPoint]
    """Points that no other beats."""
    heads: list[ChoiceRow]
    bits: list[ChoiceRow]
    speculation: dict[float, list[SpeculationRow]]
    """By acceptance."""
    experts: dict[int, list[RoutingRow]]
    """By tokens; empty for a dense model."""


def holds(model: ModelConfig, machine: Machine, plan: ServingPlan, context: float) -> bool:
    return serving_memory(model, plan, machine, batch=plan.batch, context=round(context)).fits


def points_of(model: ModelConfig, plan: ServingPlan, machine: Machine) -> list[FrontierPoint]:
    """Latency against price; empty where nothing fits on as many GPUs as were asked for."""
    try:
        return frontier(model, plan, machine, partial(holds, model, machine))
    except ConfigError:
        return []


def rows_of(model: ModelConfig, plan: ServingPlan, machine: Machine) -> list[SweepRow]:
    """Decode at a quarter of the planned context, at all of it and at four times it."""
    length = plan.prompt_tokens + plan.output_tokens
    batches = [batch for batch in BATCHES if batch >= plan.ep]
    return sweep(model, plan, machine, partial(holds, model, machine), batches=batches,
                 contexts=(max(1, length // 4), length, 4 * length))  # fmt: skip


def sweeps(model: ModelConfig, plan: ServingPlan, machine: Machine) -> Sweeps:
    """All tables of one kind of GPU. Raises ConfigError where [serving] does not divide the model."""
    context = plan.prompt_tokens + plan.output_tokens // 2
    drafted = plan.draft_tokens or DRAFT_TOKENS
    return Sweeps(
        rows_of(model, plan, machine),
        [point for point in points_of(model, plan, machine) if point.best],
        [] if model.mla else head_rows(model, plan, machine, context=context),
        bits_rows(model, plan, machine, context=context),
        {
            acceptance: speculation_rows(
                model, replace(plan, acceptance=acceptance), machine, context=context, draft_tokens=drafted
            )
            for acceptance in ACCEPTANCES
        },
        experts_of(model),
    )


def experts_of(model: ModelConfig) -> dict[int, list[RoutingRow]]:
    """Distinct experts by closed form and by chance; for 16 experts, top-2, with what a trained router did."""
    if not model.is_moe:
        return {}
    E, K = model.num_local_experts, model.num_experts_per_tok
    loads = load_counts(TRAINED_ROUTER)
    alike = (len(loads.shares), loads.top_k) == (E, K)
    shares = loads.shares if alike else [1 / E] * E
    return {tokens: routing_rows(shares, K, tokens, real=loads if alike else None) for tokens in TOKENS}


def sweeps_text(name: str, plan: ServingPlan, machine: Machine, found: Sweeps) -> str:
    """The tables one below the other."""
    context = plan.prompt_tokens + plan.output_tokens // 2
    parts = [f"serving {name} on {plan.tp * plan.pp * plan.ep} x {machine.sheet.name}", decode_text(found)]
    points = [
        [f"tp {p.plan.tp} x pp {p.plan.pp}", f"{p.gpus}", f"{p.plan.batch:,}", duration(p.first_token),
         duration(p.per_token), short(p.tokens_per_s), dollars(p.price)]
        for p in found.frontier
    ]  # fmt: skip
    head = ("layout", "GPUs", "batch", "first token", "per token", "tokens/s", "$ per 1,000")
    parts.append("latency against price, what nothing beats\n" + (table(points, head) if points else "nothing fits"))
    for title, rows in (("key-value heads", found.heads), ("bits", found.bits)):
        if rows:
            lines = [
                [row.name, size(row.cache_per_token), size(row.weight_bytes), size(row.cache_bytes),
                 duration(row.seconds), short(row.tokens_per_s)]
                for row in rows
            ]  # fmt: skip
            head = ("", "cache per token", "weights read", "cache read", "step", "tokens/s")
            parts.append(f"{title}, batch {plan.batch} at {context:,} tokens, per GPU\n{table(lines, head)}")
    parts.append(speculation_text(found))
    if found.experts:
        parts.append(experts_text(found))
    return "\n\n".join(parts)


def decode_text(found: Sweeps) -> str:
    lines = [
        [f"{row.context:,}", f"{row.batch:,}", duration(row.seconds), short(row.tokens_per_s), f"{row.mfu:.1%}",
         row.bound, "" if row.fits else "does not fit"]
        for row in found.decode
    ]  # fmt: skip
    return "decode\n" + table(lines, ("context", "batch", "step", "tokens/s", "MFU", "bound", ""))


def speculation_text(found: Sweeps) -> str:
    columns = list(found.speculation.values())
    lines = []
    for rows in zip(*columns, strict=True):
        pays = "never" if rows[0].break_even is None else f"from {rows[0].break_even:.2f}"
        read = f"{rows[0].experts_verify:.1f} for {rows[0].experts_plain:.1f}" if found.experts else "-"
        lines.append([f"{rows[0].batch:,}", *(f"{row.speedup:.2f}x" for row in rows), pays, read])
    head = ("batch", *(f"at {acceptance:.0%}" for acceptance in found.speculation), "pays", "experts read")
    return f"drafts of {columns[0][0].draft_tokens} tokens, by acceptance\n{table(lines, head)}"


def experts_text(found: Sweeps) -> str:
    lines = [
        [f"{tokens} tokens: {row.name}", f"{row.uniform:.2f}", f"{row.expected:.2f}", f"{row.simulated:.2f}",
         "-" if row.real is None else f"{row.real:.2f}"]
        for tokens, rows in found.experts.items()
        for row in rows
    ]  # fmt: skip
    return "experts that tokens meet\n" + table(lines, ("", "uniform", "by shares", "simulated", "trained router"))
