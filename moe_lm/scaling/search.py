"""The fastest layout of a training run over a number of GPUs: every one that is worth a try and fits, timed.

Left out, and no loss where a step takes longer the more it sends, waits and computes:
- Tensor parallelism beyond the GPUs that fast links join, and ZeRO-0, which sends as much as ZeRO-1 and keeps more.
- Of all numbers of stages with equally many layers on the fullest, those above the smallest: more GPUs and a longer
  bubble for the same work. Likewise interleaving that does not cut the layers of a stage evenly.
- A layout for which one with less recomputation and no higher a ZeRO stage, otherwise the same, fits.

Left out by rules of thumb:
- Micro-batches above the smallest that does not fit with all weights sharded and all layers recomputed.
- A layout that would not be among the best even if it came nearer, by `NEARER`, to what it could reach without
  communication than any of those timed first, which are the most promising of each tp, pp and ep.

Micro-batches are powers of two, and a step's batch may be rounded by `ROUNDING`. A layout may leave some GPUs idle.

p pipeline stages, v chunks of layers on a stage, m micro-batches of a step, L layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from moe_lm.config import ConfigError, ModelConfig, RunConfig, TrainingPlan
from moe_lm.scaling.advice import training_advice
from moe_lm.scaling.counts import train_flops_per_token
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Layout, lay, require_tensor_parallel, stages
from moe_lm.scaling.memory import StageMemory, fullest_stage, training_memory

ROUNDING = 0.05
"""Most by which whole micro-batches may move the tokens of a step: else a layout would win by doing less work."""

NEARER = 1.05
"""How much nearer than the nearest of those timed a layout may come to what it cannot exceed."""


class StepTime(Protocol):
    """What a step takes (moe_lm.scaling.training)."""

    @property
    def seconds(self) -> float: ...

    @property
    def parts(self) -> Mapping[str, float]: ...

    @property
    def tokens_per_second(self) -> float: ...


@dataclass(frozen=True)
class Candidate:
    """One layout that fits."""

    layout: Layout
    memory: StageMemory
    """That of the fullest stage."""
    time: StepTime
    """What its step takes."""
    loses: str = ""
    """What a runner-up loses to the winner, in words; empty for the winner."""


Sized = tuple[float, Layout, StageMemory]
"""A layout that fits: tokens/s that it cannot exceed, itself, its fullest stage."""


def search(
    run: RunConfig,
    machine: Machine,
    gpus: int,
    step_time: Callable[[ModelConfig, Layout, Machine], StepTime],
    limit: int = 8,
) -> list[Candidate]:
    """The `limit` layouts of most tokens per second on at most `gpus` devices of `machine`, the fastest first.

    [plan] gives what is not searched: dtype, sequence_parallel, flash_attention, expert_imbalance. ZeRO shards over all
    replicas. Raises ConfigError if none fits; it says by how much the closest misses, and what would mend it.
    """
    forward_flops = train_flops_per_token(run.model, run.data.sequence_length) / 3
    fitting: list[Sized] = []
    closest: tuple[float, Layout] | None = None
    for group in layout_groups(run, machine, gpus):
        for layout, memory in fitting_layouts(run.model, group, machine):
            if memory.fits:
                fitting.append((most_tokens_per_second(run.model, forward_flops, layout, machine), layout, memory))
            elif closest is None or memory.total < closest[0]:
                closest = memory.total, layout
    if not fitting:
        raise ConfigError(nothing_fits(run, machine, gpus, closest and closest[1]))
    fitting.sort(key=lambda entry: -entry[0])
    sample, rest = samples(fitting)
    timed = [
        (bound, Candidate(layout, memory, step_time(run.model, layout, machine))) for bound, layout, memory in sample
    ]
    nearest = NEARER * max(candidate.time.tokens_per_second / bound for bound, candidate in timed)
    best = [candidate for _, candidate in timed]
    for bound, layout, memory in rest:
        best = sorted(best, key=lambda candidate: -candidate.time.tokens_per_second)[:limit]
        if len(best) == limit and bound * nearest < best[-1].time.tokens_per_second:
            break
        best.append(Candidate(layout, memory, step_time(run.model, layout, machine)))
    best = sorted(best, key=lambda candidate: -candidate.time.tokens_per_second)[:limit]
    return [best[0], *(replace(other, loses=losses(other.time, best[0].time)) for other in best[1:])]


def samples(fitting: list[Sized]) -> tuple[list[Sized], list[Sized]]:
    """The first of each tp, pp and ep; and the others."""
    first: dict[tuple[int, int, int], Sized] = {}
    rest = []
    for entry in fitting:
        plan = entry[1].plan
        if first.setdefault((plan.tp, plan.pp, plan.ep), entry) is not entry:
            rest.append(entry)
    return list(first.values()), rest


def layout_groups(run: RunConfig, machine: Machine, gpus: int) -> Iterator[list[Layout]]:
    """Layouts that differ in micro_batch, recompute, zero and nothing else; micro_batch rises through each group."""
    model = run.model
    for tp in range(1, min(machine.sheet.gpus_per_node, gpus) + 1):
        if not divides(model, machine, tp):
            continue
        for pp in stage_numbers(model, gpus // tp):
            for ep in range(1, model.num_local_experts + 1) if model.is_moe else (1,):
                dp = gpus // (tp * pp * ep) * ep
                if not dp or (model.is_moe and model.num_local_experts % ep):
                    continue
                for interleave in chunk_numbers(model, pp):
                    plan = replace(
                        run.plan, tp=tp, pp=pp, ep=ep, gpus=tp * pp * dp, interleave=interleave, zero_group=None
                    )
                    group = list(micro_batched(run, plan))
                    if group:
                        yield group


def divides(model: ModelConfig, machine: Machine, tp: int) -> bool:
    """Whether `tp` ranks can share the model, and nodes hold whole groups of them."""
    try:
        require_tensor_parallel(model, tp, "plan.tp")
    except ConfigError:
        return False
    return machine.sheet.gpus_per_node % tp == 0


def stage_numbers(model: ModelConfig, most: int) -> list[int]:
    """For each number of layers on the fullest stage the fewest stages, up to `most` of them."""
    numbers: dict[int, int] = {}
    for pp in range(1, min(most, model.num_hidden_layers) + 1):
        numbers.setdefault(max(len(stage.layers) for stage in stages(model, pp)), pp)
    return list(numbers.values())


def chunk_numbers(model: ModelConfig, pp: int) -> list[int]:
    """Chunks of layers per stage: those that divide the layers of the fullest stage; one without a pipeline."""
    L = model.num_hidden_layers
    layers = -(-L // pp)
    return [v for v in range(1, layers + 1) if v == 1 or (pp > 1 and layers % v == 0 and pp * v <= L)]


def micro_batched(run: RunConfig, plan: TrainingPlan) -> Iterator[Layout]:
    """`plan` settled for every micro-batch that leaves the batch of a step nearly as it is."""
    rows = run.train.batch_tokens / run.data.sequence_length
    micro_batch = 1
    while True:
        try:
            layout = lay(run.model, replace(plan, micro_batch=micro_batch), run.data.sequence_length,
                         run.train.batch_tokens, run.train.optimizer)  # fmt: skip
        except ConfigError:  # fewer rows than replicas, and so for all larger ones
            return
        if abs(layout.micro_batches * micro_batch * layout.dp / rows - 1) <= ROUNDING:
            yield layout
        micro_batch *= 2


def fitting_layouts(model: ModelConfig, group: list[Layout], machine: Machine) -> Iterator[tuple[Layout, StageMemory]]:
    """Layouts of a group that fit and are worth timing, each with its fullest stage; at the end one that does not.

    That one has the smallest micro-batch that fits with no recomputation and no ZeRO stage, and the most of both.
    """
    for layout in group:
        tried, memory = with_memory(model, layout, machine, "full", 3)
        if not memory.fits:
            yield tried, memory
            return
        zero = 4  # one above the lowest stage that fits with less recomputation
        for recompute in ("none", "selective", "full"):
            found = None
            while zero > 1 and (entry := with_memory(model, layout, machine, recompute, zero - 1))[1].fits:
                zero, found = zero - 1, entry
            if found is not None:
                yield found


def with_memory(
    model: ModelConfig, layout: Layout, machine: Machine, recompute: str, zero: int
) -> tuple[Layout, StageMemory]:
    """`layout` with another recomputation and ZeRO stage, and its fullest stage."""
    layout = replace(layout, plan=replace(layout.plan, recompute=recompute, zero=zero))
    return layout, fullest_stage(model, layout, machine)


def most_tokens_per_second(model: ModelConfig, forward_flops: float, layout: Layout, machine: Machine) -> float:
    """What `layout` cannot exceed: its products at the rate of large ones, bubble and recomputation, nothing else.

    `forward_flops` are those of one token.
    """
    plan = layout.plan
    again = forward_flops - 2 * model.vocab_size * model.hidden_size if plan.recompute == "full" else 0
    rate = machine.sheet.peak(plan.dtype) * max(machine.reached.gemm, machine.reached.attention)
    bubble = (plan.pp - 1) / (plan.interleave * layout.micro_batches)
    return (1 + ROUNDING) * layout.gpus * rate / ((3 * forward_flops + again) * (1 + bubble))


def losses(time: StepTime, best: StepTime) -> str:
    """What `time` spends more than the `best` one, and what it saves, by parts, in seconds for the tokens of `best`."""
    slower = best.tokens_per_second / time.tokens_per_second - 1
    scale = (1 + slower) * best.seconds / time.seconds  # whole micro-batches may leave their steps unequal
    names = time.parts.keys() | best.parts.keys()
    more = {name: scale * time.parts.get(name, 0.0) - best.parts.get(name, 0.0) for name in names}
    told = [name for name in sorted(more, key=lambda name: -abs(more[name])) if abs(more[name]) >= 0.001 * best.seconds]
    parts = ", ".join(f"{name} {more[name]:+.3g} s" for name in told[:3])
    return f"{100 * slower:.1f}% slower" + (f": {parts}" if parts else "")


def nothing_fits(run: RunConfig, machine: Machine, gpus: int, closest: Layout | None) -> str:
    """Why the search is without result: what the closest layout lacks, and what mends it."""
    if closest is None:
        return (
            f"No layout over {gpus} GPUs keeps train.batch_tokens = {run.train.batch_tokens} within {ROUNDING:.0%}, "
            f"because its rows of data.sequence_length = {run.data.sequence_length} do not divide over replicas; "
            "change one of them."
        )
    plan = closest.plan
    sizes = ", ".join(f"plan.{name} = {getattr(plan, name)}" for name in ("tp", "pp", "ep", "zero", "micro_batch"))
    advice = training_advice(training_memory(run.model, closest, machine), run.model, closest, machine)
    return f'No layout over {gpus} GPUs fits. The closest is {sizes}, plan.recompute = "{plan.recompute}". {advice}'
