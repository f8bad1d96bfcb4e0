"""Seconds, rates and prices of serving: prefill, decode, and what a plan gives in all."""

import math
from dataclasses import dataclass, replace
from functools import cache

from moe_lm.config import ModelConfig, ServingPlan
from moe_lm.scaling.collectives import send
from moe_lm.scaling.constants import CALLS, DRAFT_SHARE, ENGINES, MODEL_ERROR, READS, SERVING_SPREAD, Engine
from moe_lm.scaling.counts import forward_flops_per_token
from moe_lm.scaling.forward import Forward, pipeline
from moe_lm.scaling.hardware import Machine


@dataclass(frozen=True)
class Step:
    """One step of a batch: every sequence has gone once through all layers."""

    seconds: float
    """From one token of a sequence to its next, or until the prompts are done."""
    parts: dict[str, float]
    """Seconds by what they are spent on, `seconds` in all."""
    weight_bytes: float
    """Bytes of weights that one GPU reads in the step, averaged over stages."""
    cache_bytes: float
    """Bytes of keys, values and states that one GPU reads in the step, averaged over stages."""
    flops: float
    """Operations of the batch's new tokens on all GPUs, without padding."""
    tokens: float
    """New tokens of the batch."""
    bound: str
    """What takes most of the time: memory, compute, launch, links, host or pipeline."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@cache
def flops_of_token(model: ModelConfig) -> tuple[float, float]:
    """FLOPs of a token's forward pass at no context, and what each token of context adds."""
    fixed = forward_flops_per_token(model, 0)
    return fixed, forward_flops_per_token(model, 1) - fixed


def modern_engine(machine: Machine) -> Engine:
    """The engine that plans assume: on a processor ours, whose host does its work in calls."""
    if machine.sheet.family != "cpu":
        return ENGINES["gpu"]
    call = machine.reached.launch
    return Engine(step=CALLS.step * call, message=0.0, sequence=CALLS.sequence * call)


def serving_gpus(plan: ServingPlan) -> int:
    return plan.tp * plan.pp * plan.ep


def decode_step(
    model: ModelConfig, plan: ServingPlan, machine: Machine, *, batch: float, context: float, new_tokens: float = 1,
    engine: Engine | None = None,
) -> Step:  # fmt: skip
    """One step for `batch` sequences, over all ranks, of `context` cached tokens each; all new tokens get logits.

    More than one new token is the verification of a draft. `engine` is a modern one if not given.
    Raises ConfigError where tp, pp or ep do not fit the model.
    """
    return step(model, plan, machine, batch, new_tokens, context, batch * new_tokens, engine)


def prefill(
    model: ModelConfig, plan: ServingPlan, machine: Machine, *, tokens: float, batch: float = 1,
    engine: Engine | None = None,
) -> Step:  # fmt: skip
    """`batch` prompts of `tokens` each, with logits of the last one. Raises ConfigError as `decode_step`."""
    return step(model, plan, machine, batch, tokens, 0, batch, engine)


def step(model: ModelConfig, plan: ServingPlan, machine: Machine, batch: float, tokens: float, context: float,
         outputs: float, engine: Engine | None) -> Step:  # fmt: skip
    """`tokens` new ones of each sequence, `outputs` rows of logits in all.

    Pipeline stages work at the same time, each on a micro-batch of batch / (ep pp) sequences. A sequence passes all
    stages before its next token, and the slowest stage serves all micro-batches in turn: the step lasts the longer of
    the two. Messages between stages, and what the slowest adds to the sum of all, are the part `pipeline`.
    """
    engine = engine or modern_engine(machine)
    reached = machine.reached
    reached = reached._replace(bandwidth=reached.bandwidth * READS[machine.sheet.family])
    if machine.sheet.family == "cpu":
        reached = reached._replace(launch=reached.launch * CALLS.wait)
    machine = Machine(machine.sheet, reached)
    if reached.cached > 1:  # the next step reads what this one does, or nearly that
        first = one_pass(model, plan, machine, batch, tokens, context, outputs, engine)
        machine = machine.reading(first.weight_bytes)
    return one_pass(model, plan, machine, batch, tokens, context, outputs, engine)


def one_pass(model: ModelConfig, plan: ServingPlan, machine: Machine, batch: float, tokens: float, context: float,
             outputs: float, engine: Engine) -> Step:  # fmt: skip
    """`step` on a machine whose rates are those of serving."""
    layout = pipeline(model, plan.tp, plan.pp, plan.ep)
    local = max(1.0, batch / plan.ep)  # the busiest rank has a sequence, even where others have none
    flying = min(float(plan.pp), local)  # micro-batches
    forward = Forward(model, plan, machine, engine, local / flying, batch / flying, tokens, context)
    layers = {kind: forward.layer(kind) for kind in layout.layers}
    output = forward.output(forward.sequences * outputs / batch)
    hop = 0.0
    if plan.pp > 1:
        hop = send(machine, forward.rows * model.hidden_size * forward.residual, stride=plan.tp * plan.ep)
    alone = {kind: sum(part.seconds for part in parts.values()) for kind, parts in layers.items()}
    head = sum(part.seconds for part in output.values())
    slowest = max(
        hop + sum(count * alone[kind] for kind, count in held.items()) + (head if output_here else 0.0)
        for held, output_here in layout.stages
    )
    parts: dict[str, float] = {}
    host = engine.step + engine.sequence * batch
    bounds: dict[str, float] = {"host": host}
    weights = cached = 0.0
    for count, named in [*((layout.layers[kind], layers[kind]) for kind in layers), (1, output)]:
        for name, part in named.items():
            parts[name] = parts.get(name, 0.0) + count * part.seconds
            bounds[part.bound] = bounds.get(part.bound, 0.0) + count * part.seconds
            weights += count * part.weights
            cached += count * part.cache
    parts["host"] = host
    through = sum(parts.values())
    total = max(through + plan.pp * hop, flying * slowest)
    if plan.pp > 1:
        parts["pipeline"] = bounds["pipeline"] = total - through
    fixed, each = flops_of_token(model)
    flops = batch * tokens * (fixed + each * (context + (tokens + 1) / 2))
    scale = flying / plan.pp
    bound = max(bounds, key=bounds.__getitem__)
    return Step(total, parts, scale * weights, scale * cached, flops, batch * tokens, bound)


def decode_rate(model: ModelConfig, plan: ServingPlan, machine: Machine, *, batch: float, context: float,
                engine: Engine | None = None) -> float:  # fmt: skip
    """Tokens/s of all `batch` sequences together while they decode at `context` cached tokens, without speculation."""
    return decode_step(model, plan, machine, batch=batch, context=context, engine=engine).tokens_per_s


def expected_tokens(acceptance: float, draft_tokens: int) -> float:
    """Tokens that a step gives on average, (1 - a^(g + 1)) / (1 - a), if each of g drafted ones is accepted with chance
    a where those before it were (Leviathan et al. 2023, equation 1)."""
    return sum(acceptance**n for n in range(draft_tokens + 1))


@dataclass(frozen=True)
class Serving:
    """What a plan gives while it is full: `batch` requests, each a prompt and then an answer, again and again.

    The same GPUs prefill and decode, prompts batched as the answers are.
    """

    first_token: float
    """Seconds of one prompt's prefill, when nothing is before it."""
    per_token: float
    """Seconds from a token of an answer to its next, at the mean context."""
    tokens_per_s: float
    """Tokens of answers, on all GPUs."""
    tokens_per_s_per_gpu: float
    price_output: float
    """Dollars for 1,000 tokens of answers, their prompts included."""
    price: float
    """Dollars for 1,000 tokens, of prompts and answers alike."""
    mfu: float
    """Share of the peak FLOP/s of the plan's dtype, over prefill and decode."""
    bandwidth: float
    """Share of the memory's bandwidth in decode, weights and cache."""


def serve(model: ModelConfig, plan: ServingPlan, machine: Machine, engine: Engine | None = None) -> Serving:
    """What the plan gives with the machine's constants as they are. Raises ConfigError as `decode_step`.

    With draft_tokens > 0 a step verifies a draft of which each token cost DRAFT_SHARE of a plain step.
    """
    prompt, output, batch = plan.prompt_tokens, plan.output_tokens, plan.batch
    context, gpus = prompt + output / 2, serving_gpus(plan)
    first = prefill(model, plan, machine, tokens=prompt, engine=engine)
    prompts = prefill(model, plan, machine, tokens=prompt, batch=batch, engine=engine)
    plain = decode_step(model, plan, machine, batch=batch, context=context, engine=engine)
    step, seconds, gained = plain, plain.seconds, 1.0
    if plan.draft_tokens:
        step = decode_step(model, plan, machine, batch=batch, context=context, new_tokens=plan.draft_tokens + 1,
                           engine=engine)  # fmt: skip
        seconds = step.seconds + plan.draft_tokens * DRAFT_SHARE * plain.seconds
        gained = expected_tokens(plan.acceptance, plan.draft_tokens)
    busy = prompts.seconds + output / gained * seconds
    rate = batch * output / busy
    dollars = gpus * (plan.price or machine.sheet.price) / 3600
    return Serving(
        first_token=first.seconds,
        per_token=seconds / gained,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / gpus,
        price_output=1000 * dollars / rate,
        price=1000 * dollars / (rate * (prompt + output) / output),
        mfu=(prompts.flops + output * plain.flops) / (busy * gpus * machine.sheet.peak(plan.dtype)),
        bandwidth=(step.weight_bytes + step.cache_bytes) / (seconds * machine.sheet.bandwidth),
    )


@dataclass(frozen=True)
class Range:
    """A forecast figure: as the constants are, and as far as they are uncertain."""

    low: float
    mid: float
    high: float
    moved_by: str
    """The constant of SERVING_SPREAD whose uncertainty moves it most."""


@dataclass(frozen=True)
class ServingForecast:
    """The figures of `Serving`, each with its range."""

    figures: dict[str, Range]
    """By the field of `Serving`."""
    gpus: int
    largest_part: str
    """What most of a decode step is spent on."""
    bound: str
    """What bounds a decode step: memory, compute, launch, links, host or pipeline."""


def forecast(model: ModelConfig, plan: ServingPlan, machine: Machine) -> ServingForecast:
    """What serving by the plan gives, with low and high. Raises ConfigError as `decode_step`.

    Each constant is moved to its worse and better value alone; deviations, as ratios, add up as independent ones do.
    """
    engine = modern_engine(machine)
    mid = vars(serve(model, plan, machine, engine))
    moved = {
        name: [vars(serve(model, plan, *changed(machine, engine, name, factor))) for factor in factors]
        for name, factors in SERVING_SPREAD.items()
    }
    figures, own = {}, math.log1p(MODEL_ERROR["decode"])
    for key, value in mid.items():
        if not value:  # what costs nothing
            figures[key] = Range(0.0, 0.0, 0.0, "")
            continue
        ratios = {name: [math.log(case[key] / value) for case in cases] for name, cases in moved.items()}
        down = math.hypot(own, *(min(0.0, *pair) for pair in ratios.values()))
        up = math.hypot(own, *(max(0.0, *pair) for pair in ratios.values()))
        most = max(ratios, key=lambda name: max(map(abs, ratios[name])))
        most_there_is = max(1.0, value) if key in ("mfu", "bandwidth") else math.inf
        figures[key] = Range(value * math.exp(-down), value, min(most_there_is, value * math.exp(up)), most)
    context = plan.prompt_tokens + plan.output_tokens / 2
    step = decode_step(model, plan, machine, batch=plan.batch, context=context)
    largest = max(step.parts, key=step.parts.__getitem__)
    return ServingForecast(figures, serving_gpus(plan), largest, step.bound)


def changed(machine: Machine, engine: Engine, name: str, factor: float) -> tuple[Machine, Engine]:
    """Machine and engine with the constant `name` times `factor`; a share stays at most 1."""
    if name in engine._fields:
        return machine, engine._replace(**{name: getattr(engine, name) * factor})
    value = getattr(machine.reached, name)
    limit = math.inf if name == "launch" else max(1.0, value)
    return replace(machine, reached=machine.reached._replace(**{name: min(limit, value * factor)})), engine
