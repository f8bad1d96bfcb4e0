"""Latency, throughput and price of serving over layouts and batches, and which of these points nothing beats."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_lm.config import ConfigError, ModelConfig, ServingPlan
from moe_lm.scaling.forward import pipeline
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.serving import decode_step, serve, serving_gpus

Fits = Callable[[ServingPlan, float], bool]
"""Whether a plan's batch fits into memory at a context of so many tokens."""


@dataclass(frozen=True)
class FrontierPoint:
    """One layout with one batch."""

    plan: ServingPlan
    gpus: int
    first_token: float
    """Seconds."""
    per_token: float
    """Seconds between the tokens of one answer."""
    tokens_per_s: float
    """Tokens of answers, on all GPUs."""
    tokens_per_s_per_gpu: float
    price: float
    """Dollars for 1,000 tokens of answers, their prompts included."""
    best: bool
    """Whether no other point is both faster to the next token and cheaper."""


def layouts(model: ModelConfig, plan: ServingPlan, machine: Machine, gpus: int | None) -> Iterator[ServingPlan]:
    """The plan with every power of two as tp within a node and as pp that the model allows, up to the GPUs of `plan`.

    With `gpus` only layouts of that many, whose pp may be any number.
    """
    most = gpus or serving_gpus(plan)
    tp = 1
    while tp <= machine.sheet.gpus_per_node and tp * plan.ep <= most:
        if gpus is None:
            stages = [2**n for n in range((most // (tp * plan.ep)).bit_length())]
        else:
            stages = [gpus // (tp * plan.ep)] if gpus % (tp * plan.ep) == 0 else []
        for pp in stages:
            try:
                pipeline(model, tp, pp, plan.ep)
            except ConfigError:  # sizes that do not divide each other: no candidate
                continue
            yield replace(plan, tp=tp, pp=pp)
        tp *= 2


def frontier(
    model: ModelConfig, plan: ServingPlan, machine: Machine, fits: Fits, *, gpus: int | None = None,
    batches: Sequence[int] = tuple(2**n for n in range(14)),
) -> list[FrontierPoint]:  # fmt: skip
    """Every layout with every batch that `fits` at the end of an answer, from the shortest time per token on.

    Raises ConfigError where none fits.
    """
    longest = plan.prompt_tokens + plan.output_tokens
    found = []
    for layout in layouts(model, plan, machine, gpus):
        for batch in batches:
            tried = replace(layout, batch=batch)
            if batch >= plan.ep and fits(tried, longest):
                found.append((tried, serve(model, tried, machine)))
    if not found:
        raise ConfigError(
            f"no layout of up to {gpus or serving_gpus(plan)} GPUs holds the model and one request of {longest} "
            "tokens: raise serving.tp or serving.pp, or lower serving.weight_bits."
        )
    found.sort(key=lambda pair: (pair[1].per_token, pair[1].price_output))
    points = []
    for tried, given in found:
        figures = (given.first_token, given.per_token, given.tokens_per_s, given.tokens_per_s_per_gpu)
        points.append(FrontierPoint(tried, serving_gpus(tried), *figures, given.price_output, best=False))
    best = set(map(id, unbeaten(points)))
    return [replace(point, best=id(point) in best) for point in points]


def unbeaten(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Those than which no other of them is both faster to the next token and cheaper, fastest first."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.per_token, point.price)):
        if not kept or point.price < kept[-1].price:
            kept.append(point)
    return kept


@dataclass(frozen=True)
class SweepRow:
    """A decode step at one batch and context."""

    batch: int
    context: int
    seconds: float
    tokens_per_s: float
    weight_bytes: float
    """That one GPU reads."""
    cache_bytes: float
    """That one GPU reads."""
    mfu: float
    bound: str
    fits: bool


def sweep(
    model: ModelConfig, plan: ServingPlan, machine: Machine, fits: Fits, *, batches: Sequence[int],
    contexts: Sequence[int],
) -> list[SweepRow]:  # fmt: skip
    """Decode steps at every context and batch, whether they fit or not."""
    peak = serving_gpus(plan) * machine.sheet.peak(plan.dtype)
    rows = []
    for context in contexts:
        for batch in batches:
            step = decode_step(model, plan, machine, batch=batch, context=context)
            held = fits(replace(plan, batch=batch), context)
            mfu = step.flops / (step.seconds * peak)
            read = (step.weight_bytes, step.cache_bytes)
            rows.append(SweepRow(batch, context, step.seconds, step.tokens_per_s, *read, mfu, step.bound, held))
    return rows
