"""Seconds of an optimizer step over a cluster, from the roofline of each operation and the collectives between ranks.

p pipeline stages, v chunks of layers on each, m micro-batches of a step. One stage, the slowest, sets the pace of the
pipeline: it works m times, and waits (p - 1) / v times as long as one micro-batch takes it (Narayanan et al. 2021,
section 2.2.1, whose bubble (p - 1) / (v m) is a share of the work).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from moe_lm.config import ModelConfig, RunConfig, TrainConfig
from moe_lm.scaling.collectives import all_gather, all_reduce, reduce_scatter, send
from moe_lm.scaling.constants import MODEL_ERROR, RELIABILITY, RELIABILITY_SPREAD, SPREAD, Reliability
from moe_lm.scaling.counts import forward_flops_per_token, layer_parameters, parameters, train_flops_per_token
from moe_lm.scaling.goodput import Goodput, goodput
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Kind, Layout, Stage, first_alike, kind, stages
from moe_lm.scaling.optimizers import optimizer_seconds
from moe_lm.scaling.training_ops import Rank, Work, embedding_work, layer_work, output_work

PARTS = ("gemm", "experts", "attention", "elementwise", "router", "embedding_and_loss", "recompute", "tensor_parallel",
         "expert_all_to_all", "pipeline_sends", "bubble", "data_parallel", "optimizer")  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """One optimizer step."""

    seconds: float
    parts: Mapping[str, float]
    """Seconds of the critical path by PARTS; they add up to `seconds`."""
    tokens: int
    """Tokens of the step, over all replicas."""
    flops: float
    """What the model asks for, over all GPUs: forward and backward, causal attention."""
    hardware_flops: float
    """The same with what is computed again."""
    mfu: float
    """Share of all GPUs' peak in the plan's dtype that `flops` are (Chowdhery et al. 2022, appendix B)."""
    hfu: float
    """The same of `hardware_flops`."""
    tokens_per_second: float


def step_time(model: ModelConfig, layout: Layout, machine: Machine) -> StepTime:
    """The time of a step of `layout`. Raises ConfigError if the machine does not multiply the plan's dtype."""
    plan, m = layout.plan, layout.micro_batches
    rank = Rank(
        machine, layout.micro_tokens, layout.sequence_length, plan.tp, plan.ep, plan.dtype, plan.sequence_parallel,
        plan.flash_attention, plan.recompute, plan.expert_imbalance or machine.reached.imbalance,
    )  # fmt: skip
    slowest, forward, backward = max(
        (stage_seconds(model, stage, rank) for stage in distinct_stages(model, plan.pp, plan.interleave)),
        key=lambda found: sum(found[1].values()) + sum(found[2].values()),
    )
    parts = Counter()
    for part in forward | backward:
        parts[part] = m * (forward[part] + backward[part])
    sends = m * 2 * sending(model, layout, machine)
    parts["pipeline_sends"] = sends
    parts["bubble"] = sum(parts.values()) / m * (plan.pp - 1) / plan.interleave
    busy = reductions(layout) * (sum(forward.values()) + sum(backward.values()))
    exchanged = data_parallel(slowest, layout, machine)
    parts["data_parallel"] = exchanged - machine.reached.overlap * min(exchanged, busy)
    parts["optimizer"] = optimizer_seconds(model, slowest.samples, slowest.dense, slowest.experts, layout, machine)

    tokens = layout.dp * m * layout.micro_tokens
    flops = model_flops_per_token(model, layout.sequence_length) * tokens
    again = recomputed_flops_per_token(model, layout.sequence_length, plan.recompute, plan.flash_attention)
    hardware = flops + again * tokens
    seconds = sum(parts.values())
    peak = layout.gpus * machine.sheet.peak(plan.dtype)
    return StepTime(
        seconds, {part: parts[part] for part in PARTS}, tokens, flops, hardware,
        flops / seconds / peak, hardware / seconds / peak, tokens / seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class StageWork:
    """What a stage computes and holds, layers of a kind taken together."""

    layers: tuple[tuple[Kind, int], ...]
    samples: tuple[tuple[int, int], ...]
    """The same by the first layer of each kind."""
    embedding: bool
    output: bool
    dense: int
    """Weights that all replicas hold, before tensor parallelism splits them."""
    experts: int
    """Weights of routed experts, before expert and tensor parallelism split them."""


@lru_cache(maxsize=512)
def distinct_stages(model: ModelConfig, pp: int, interleave: int) -> tuple[StageWork, ...]:
    """The stages of a pipeline, one of each that does the same."""
    return tuple(dict.fromkeys(stage_work(model, stage) for stage in stages(model, pp, interleave)))


def stage_work(model: ModelConfig, stage: Stage) -> StageWork:
    held = [layer_weights(model, layer) for layer in stage.layers]
    tables = model.vocab_size * model.hidden_size
    return StageWork(
        tuple(Counter(kind(model, layer) for layer in stage.layers).items()),
        tuple(Counter(first_alike(model)[layer] for layer in stage.layers).items()),
        stage.embedding,
        stage.output,
        sum(dense for dense, _ in held) + tables * (stage.embedding + (stage.output and not model.tie_word_embeddings)),
        sum(experts for _, experts in held),
    )


@lru_cache(maxsize=4096)
def layer_weights(model: ModelConfig, layer: int) -> tuple[int, int]:
    weights = layer_parameters(model, layer)
    return weights.total - weights.experts, weights.experts


def stage_seconds(model: ModelConfig, stage: StageWork, rank: Rank) -> tuple[StageWork, Counter, Counter]:
    """The stage, and by part the seconds of one micro-batch forward and backward."""
    forward, backward = Counter(), Counter()

    def add(work: Work, times: int, again: bool) -> None:
        for part, seconds in work.forward.items():
            forward[part] += times * seconds
            if again:  # the collectives run again, too
                backward["recompute"] += times * seconds
        for part, seconds in work.backward.items():
            if part != "recompute" or not again:
                backward[part] += times * seconds

    for layer, times in stage.layers:
        add(layer_work(model, layer, rank), times, rank.recompute == "full")
    if stage.embedding:
        add(embedding_work(model, rank), 1, False)
    if stage.output:
        add(output_work(model, rank), 1, False)
    return stage, forward, backward


def sending(model: ModelConfig, layout: Layout, machine: Machine) -> float:
    """Seconds to hand a micro-batch on from every chunk of a stage.

    Each tensor-parallel rank sends its share; without sequence parallelism the next node gathers the shares over its
    fast links (Narayanan et al. 2021, section 4.1).
    """
    plan = layout.plan
    if plan.pp == 1:
        return 0.0
    nbytes = layout.micro_tokens * model.hidden_size * 2
    seconds = send(machine, nbytes / plan.tp, plan.tp * layout.dp)
    if not plan.sequence_parallel:
        seconds += all_gather(machine, nbytes, plan.tp)
    if plan.interleave > 1:  # the chunk that is not waiting computes
        seconds *= 1 - machine.reached.overlap
    return plan.interleave * seconds


def data_parallel(stage: StageWork, layout: Layout, machine: Machine) -> float:
    """Seconds of the replicas' traffic in a step, of which some runs beside the computation.

    Gradients and weights have 2 bytes. Without sharding an all-reduce of the gradients; with ZeRO 1 they are scattered
    and the weights gathered once a step; with ZeRO 2 gradients are scattered as often as `reductions` says; with ZeRO 3
    weights are gathered for every forward and every backward, too (Rajbhandari et al. 2020, section 7). Groups that
    shard apart then sum their shards.
    """
    plan, seconds = layout.plan, 0.0
    for weights, replicas, stride in (
        (stage.dense / plan.tp, layout.dp, plan.tp),
        (stage.experts / plan.tp / plan.ep, layout.dp // plan.ep, plan.tp * plan.ep),
    ):
        nbytes = 2 * weights
        if not nbytes:
            continue
        if plan.zero == 0:
            seconds += all_reduce(machine, nbytes, replicas, stride)
            continue
        group = min(replicas, layout.zero_group)
        gathers = 2 * layout.micro_batches if plan.zero == 3 else 1
        seconds += reductions(layout) * reduce_scatter(machine, nbytes, group, stride)
        seconds += gathers * all_gather(machine, nbytes, group, stride)
        seconds += all_reduce(machine, nbytes / group, replicas // group, stride * group)
    return seconds


def reductions(layout: Layout) -> int:
    """How often a step scatters gradients: what is sharded cannot wait for the next micro-batch. In a pipeline ZeRO 2
    waits all the same, for the end of each chunk's last backward (MegaScale, Jiang et al. 2024, section 3.2)."""
    zero = layout.plan.zero
    return layout.micro_batches if zero == 3 or (zero == 2 and layout.plan.pp == 1) else 1


@lru_cache(maxsize=512)
def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    return train_flops_per_token(model, sequence_length)


@lru_cache(maxsize=512)
def recomputed_flops_per_token(model: ModelConfig, sequence_length: int, recompute: str, flash: bool) -> float:
    """FLOPs of the forward that the backward does again. Fused attention has nothing left for `selective`."""
    forward = forward_flops_per_token(model, (sequence_length + 1) / 2)
    if recompute == "full":
        return forward - 2 * model.vocab_size * model.hidden_size
    if recompute == "selective" and not flash:
        return forward - forward_flops_per_token(model, 0)
    return 0.0


class Interval(NamedTuple):
    """A prediction with its bounds."""

    low: float
    mid: float
    high: float

    def times(self, factor: float) -> "Interval":
        return Interval(*(factor * value for value in self))


@dataclass(frozen=True)
class Forecast:
    """A whole run, failures and checkpoints included."""

    seconds: Interval
    days: Interval
    gpu_hours: Interval
    cost: Interval
    """Dollars, at plan.price or the sheet's."""
    mfu: Interval
    """Of all the time on the clock."""
    tokens: float
    flops: float
    moved: Mapping[str, tuple[float, float]]
    """Seconds of the run with one constant at its low and at its high, those that move it most first."""
    step: StepTime
    """A step with the full batch."""
    goodput: Goodput

    @property
    def assumption(self) -> str:
        """The constant that moves the prediction most."""
        return next(iter(self.moved))


def forecast(run: RunConfig, layout: Layout, machine: Machine) -> Forecast:
    """The run of [train], its ramp of the batch included.

    Each uncertain constant is varied alone over its range (constants.SPREAD); as nothing ties them together, what each
    adds to the logarithm of the time, or takes off it, is summed in squares for `high` and `low`.
    """
    weights = parameters(run.model).total

    def seconds(machine: Machine, reliability: Reliability) -> float:
        return work_seconds(run.model, run.train, layout, machine) / goodput(weights, layout.gpus, reliability).share

    mid = seconds(machine, RELIABILITY)
    moved = {}
    for name, factors in SPREAD.items():
        machines = [Machine(machine.sheet, varied(machine.reached, name, factor)) for factor in factors]
        moved[name] = tuple(seconds(other, RELIABILITY) for other in machines)
    for name, factors in RELIABILITY_SPREAD.items():
        moved[name] = tuple(seconds(machine, varied(RELIABILITY, name, f)) for f in factors)
    moved = dict(sorted(moved.items(), key=lambda item: -abs(math.log(item[1][0] / item[1][1]))))
    own = math.log1p(MODEL_ERROR["training"])
    slower = math.hypot(own, *(math.log(max(mid, *pair) / mid) for pair in moved.values()))
    faster = math.hypot(own, *(math.log(min(mid, *pair) / mid) for pair in moved.values()))
    interval = Interval(mid * math.exp(-faster), mid, mid * math.exp(slower))

    tokens = sum(times * batch for batch, times in batches(run.train))
    flops = train_flops_per_token(run.model, layout.sequence_length) * tokens
    price = layout.plan.price or machine.sheet.price
    hours = interval.times(layout.gpus / 3600)
    peak = layout.gpus * machine.sheet.peak(layout.plan.dtype)
    return Forecast(
        interval, interval.times(1 / 86400), hours, hours.times(price),
        Interval(*(flops / peak / value for value in reversed(interval))), tokens, flops, moved,
        step_time(run.model, layout, machine), goodput(weights, layout.gpus),
    )  # fmt: skip


def varied(constants: NamedTuple, name: str, factor: float) -> NamedTuple:
    """Constants with one of them `factor` times as large; what is a share stays one."""
    before = getattr(constants, name)
    value = factor * before
    return constants._replace(**{name: min(value, 1.0) if before <= 1 else value})


def work_seconds(model: ModelConfig, train: TrainConfig, layout: Layout, machine: Machine) -> float:
    """Seconds of all steps, without failures and checkpoints.

    A batch that is no whole number of micro-batches takes its share of the nearest one that is; one that is too small
    to give each replica a micro-batch takes as long as one micro-batch each.
    """

    def seconds(batch: float) -> float:
        exact = batch / layout.dp / layout.micro_tokens
        whole = max(1, round(exact))
        return max(1.0, exact) / whole * step(whole)

    @lru_cache
    def step(micro_batches: int) -> float:
        return step_time(model, replace(layout, micro_batches=micro_batches), machine).seconds

    return sum(times * seconds(batch) for batch, times in batches(train))


RAMP_POINTS = 16
"""At how many batches a ramp is sampled: its steps' times are nearly a line in the batch."""


def batches(train: TrainConfig) -> list[tuple[float, float]]:
    """Tokens of a batch, and how many steps have it: the ramp in RAMP_POINTS equal stretches, then the rest."""
    ramp = min(train.batch_ramp_steps, train.steps)
    if not ramp:
        return [(train.batch_tokens, train.steps)]
    start, rise = train.batch_tokens_start, (train.batch_tokens - train.batch_tokens_start) / train.batch_ramp_steps
    stretch = ramp / RAMP_POINTS
    climbing = [(start + rise * (point + 0.5) * stretch, stretch) for point in range(RAMP_POINTS)]
    return [*climbing, (train.batch_tokens, train.steps - ramp)]
