"""A plan as text."""

from collections.abc import Callable, Sequence

from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.plan import Plan, ServingAnswer, TrainingAnswer
from moe_lm.scaling.search import Candidate
from moe_lm.scaling.serving import Range
from moe_lm.scaling.text import dollars, duration, short, size, table
from moe_lm.scaling.training import Interval

COMPONENTS = {
    "experts": "routed experts", "shared_experts": "shared experts", "dense_mlp": "dense MLPs",
    "attention": "attention", "mamba": "Mamba", "cross_attention": "cross-attention", "router": "routers",
    "embedding": "embedding", "output": "output", "norms": "norms", "vision_encoder": "vision encoder",
}  # fmt: skip
UNPLANNED = {
    "router_bias_update_rate": "the biases, a float32 for each routed expert, are no parameters and are not counted",
    "expert_capacity_factor": "a dropped slot is computed all the same, so the plan is that of a dropless router",
    "uniform_routing": "the load of a rank is planned as that of any router: set plan.expert_imbalance = 1",
}
"""Settings of a router that the plan is the same with, and why."""


def interval(values: Interval | Range, show: Callable[[float], str]) -> str:
    """Mid, then low to high in brackets."""
    return f"{show(values.mid)} ({show(values.low)} to {show(values.high)})"


SERVING_FIGURES = (
    ("first_token", "time to first token", duration),
    ("per_token", "time per token", duration),
    ("tokens_per_s", "tokens/s", short),
    ("tokens_per_s_per_gpu", "tokens/s per GPU", short),
    ("price_output", "per 1,000 tokens of answers", dollars),
    ("price", "per 1,000 tokens, prompts too", dollars),
    ("mfu", "MFU", "{:.1%}".format),
    ("bandwidth", "share of bandwidth in decode", "{:.1%}".format),
)


def plan_text(plan: Plan) -> str:
    """The whole answer, section by section."""
    parts = [parameters_text(plan), compute_text(plan)]
    parts += [training_text(plan, answer) for answer in plan.training]
    parts += [serving_text(plan, answer) for answer in plan.serving]
    return "\n\n".join(parts)


def parameters_text(plan: Plan) -> str:
    counts = plan.parameters
    rows = [
        [label, f"{getattr(counts, name):,}", f"{getattr(counts, name) / counts.total:.1%}"]
        for name, label in COMPONENTS.items()
        if getattr(counts, name)
    ]
    rows += [
        ["total", f"{counts.total:,}", "100.0%"],
        ["active per token", f"{counts.active:,}", f"{counts.active / counts.total:.1%}"],
    ]
    only = plan.model.only_planned
    note = (
        f"\nplanned only, moe_lm.model does not build it: {', '.join(f'model.{name}' for name in only)}" if only else ""
    )
    note += "".join(
        f"\nmodel.{name} = {getattr(plan.model, name)}: {reason}"
        for name, reason in UNPLANNED.items()
        if getattr(plan.model, name)
    )
    return (
        f"{plan.name}: {short(counts.total)} parameters, {short(counts.active)} active per token\n{table(rows)}{note}"
    )


def compute_text(plan: Plan) -> str:
    length = plan.run.data.sequence_length
    return table(
        [
            ["forward pass", f"{short(plan.forward_flops_per_token)}FLOP per token", f"rows of {length:,}"],
            ["training", f"{short(plan.train_flops_per_token)}FLOP per token", "forward and backward"],
            ["KV cache", f"{size(plan.cache_bytes_per_token)} per token", f"{plan.run.serving.kv_bits} bits"],
        ]
    )


def layout_text(answer: TrainingAnswer) -> str:
    layout, plan = answer.layout, answer.layout.plan
    words = [f"tp {plan.tp}", f"pp {plan.pp}", f"dp {layout.dp}"]
    words += [f"ep {plan.ep}"] if plan.ep > 1 else []
    words += [f"interleave {plan.interleave}"] if plan.interleave > 1 else []
    group = f" in groups of {plan.zero_group}" if plan.zero_group else ""
    words += [f"ZeRO {plan.zero}{group}", f"recompute {plan.recompute}", plan.dtype]
    return ", ".join(words)


def training_text(plan: Plan, answer: TrainingAnswer) -> str:
    layout, told = answer.layout, answer.forecast
    fullest = max(answer.memory, key=lambda stage: stage.total)
    memory = [
        [name, size(getattr(fullest, name))]
        for name in ("weights", "gradients", "optimizer", "activations", "buffers", "overhead")
    ]
    memory.append(["in all", f"{size(fullest.total)} of {size(fullest.limit)}"])
    step = told.step
    parts = sorted(((name, seconds) for name, seconds in step.parts.items() if seconds), key=lambda part: -part[1])
    times = [[name.replace("_", " "), duration(seconds), f"{seconds / step.seconds:.1%}"] for name, seconds in parts]
    head = f"training on {layout.gpus:,} x {answer.machine.sheet.name}: {layout_text(answer)}"
    batch = (
        f"steps of {short(layout.batch_tokens)} tokens, {layout.micro_batches} micro-batches of "
        f"{layout.micro_tokens:,} tokens on each of {layout.dp} replicas; {short(told.tokens)} tokens in all, "
        f"{told.flops:.3g} FLOP"
    )
    moved = sorted(told.moved[told.assumption])
    sections = [
        head,
        batch,
        answer.advice,
        f"memory per GPU, fullest of {len(answer.memory)} stages\n{table(memory)}",
        f"a step takes {duration(step.seconds)}: {short(step.tokens_per_second)} tokens/s, MFU {step.mfu:.1%}\n"
        f"{table(times)}",
        table(
            [
                ["time", interval(told.seconds, duration)],
                ["GPU-hours", interval(told.gpu_hours, short)],
                ["cost", interval(told.cost, dollars)],
                ["MFU on the clock", interval(told.mfu, lambda share: f"{share:.1%}")],
            ]
        ),
        f"what moves it most: {told.assumption.replace('_', ' ')} ({' to '.join(map(duration, moved))})",
    ]
    return "\n".join(sections)


def serving_text(plan: Plan, answer: ServingAnswer) -> str:
    asked, memory, told = plan.run.serving, answer.memory, answer.forecast
    words = [f"tp {asked.tp}", f"pp {asked.pp}"] + ([f"ep {asked.ep}"] if asked.ep > 1 else [])
    words += [f"weights of {asked.weight_bits} bits", f"cache of {asked.kv_bits}"]
    words += [f"drafts of {asked.draft_tokens}, {asked.acceptance:.0%} accepted"] if asked.draft_tokens else []
    tokens = f"{asked.prompt_tokens:,} tokens of prompt and {asked.output_tokens:,} of answer"
    load = f"{asked.batch} requests at once, {tokens}"
    held = [[name, size(getattr(memory, name))] for name in ("weights", "cache", "state", "buffers", "overhead")]
    held = [line for line in held if line[1] != "0 B"] + [["in all", f"{size(memory.per_gpu)} of {size(memory.limit)}"]]
    twice = (
        f"; {size(memory.replicated_cache)} of the cache are copies on other ranks" if memory.replicated_cache else ""
    )
    figures = [
        [label, interval(told.figures[name], show), told.figures[name].moved_by]
        for name, label, show in SERVING_FIGURES
    ]
    return "\n".join(
        [
            f"serving on {told.gpus} x {answer.machine.sheet.name}: {', '.join(words)}",
            load,
            answer.advice,
            f"memory per GPU, fullest stage (at most {answer.largest_batch:,} such requests fit{twice})\n{table(held)}",
            f"a decode step is mostly {told.largest_part}, bound by {told.bound}",
            table(figures, ("", "mid (low to high)", "moved most by")),
        ]
    )


def search_text(machine: Machine, gpus: int, found: Sequence[Candidate]) -> str:
    """The layouts that --search found, the fastest first, and what the others lose to it."""
    rows = []
    for place, each in enumerate(found, 1):
        plan = each.layout.plan
        shape = [
            plan.tp,
            plan.pp,
            each.layout.dp,
            plan.ep,
            plan.zero,
            plan.micro_batch,
            plan.interleave,
            plan.recompute,
        ]
        rows.append([str(place), *map(str, shape), size(each.memory.total), f"{each.time.mfu:.1%}",
                     short(each.time.tokens_per_second), each.loses or "the fastest"])  # fmt: skip
    head = (
        "",
        "tp",
        "pp",
        "dp",
        "ep",
        "zero",
        "micro",
        "chunks",
        "recompute",
        "memory",
        "MFU",
        "tokens/s",
        "against the first",
    )
    return f"layouts of at most {gpus:,} x {machine.sheet.name}\n{table(rows, head)}"
