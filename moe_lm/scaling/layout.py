"""How a model lies over ranks: sizes of the groups, and which layers each pipeline stage holds.

L layers, p pipeline stages, v chunks of layers that a stage holds.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_lm.config import ConfigError, ModelConfig, RunConfig, ServingPlan, TrainingPlan, require
from moe_lm.scaling.counts import crosses, layer_parameters, vision_parameters


@dataclass(frozen=True)
class Layout:
    """A TrainingPlan whose sizes are settled, with the batch it works on."""

    plan: TrainingPlan
    gpus: int
    dp: int
    """Replicas."""
    sequence_length: int
    """Tokens of a row."""
    batch_tokens: int
    """Tokens of an optimizer step, over all replicas."""
    micro_batches: int
    """Forwards that a replica's stage makes per optimizer step."""
    optimizer: str = "adamw"
    """train.optimizer"""
    expert_ns_steps: float = 5
    """Muon's iterations for an expert, in the mean of the optimizer's steps."""

    @property
    def micro_tokens(self) -> int:
        """Tokens in one forward of a stage."""
        return self.plan.micro_batch * self.sequence_length

    @property
    def zero_group(self) -> int:
        """Replicas that shard among themselves."""
        return self.plan.zero_group or self.dp


class Kind(NamedTuple):
    """What tells the layers of a model apart."""

    attends: bool
    """Self-attention; else Mamba."""
    routes: bool
    """A mixture; else a dense MLP."""
    crosses: bool
    """Cross-attention and its MLP stand before it."""


def kind(model: ModelConfig, layer: int) -> Kind:
    """What block `layer`, from 0, is."""
    return Kind(model.attends(layer), model.routes(layer), crosses(model, layer))


@functools.cache
def first_alike(model: ModelConfig) -> tuple[int, ...]:
    """For each layer, the first that is of its kind."""
    first: dict[Kind, int] = {}
    return tuple(first.setdefault(kind(model, layer), layer) for layer in range(model.num_hidden_layers))


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds."""

    layers: tuple[int, ...]
    embedding: bool
    """Whether it holds the table of tokens."""
    output: bool
    """Whether it holds the last norm and the projection to the vocabulary."""


def settle(run: RunConfig) -> Layout:
    """The layout that [plan] asks for. Raises ConfigError where sizes do not divide each other."""
    train = run.train
    laid = lay(run.model, run.plan, run.data.sequence_length, train.batch_tokens, train.optimizer)
    return replace(laid, expert_ns_steps=train.expert_ns_steps / train.expert_muon_every)


def lay(
    model: ModelConfig, plan: TrainingPlan, sequence_length: int, batch_tokens: int, optimizer: str = "adamw"
) -> Layout:
    """`plan` settled for optimizer steps of `batch_tokens` in rows of `sequence_length`. Raises ConfigError."""
    replica = plan.tp * plan.pp
    gpus = plan.gpus or replica * plan.ep
    require(
        gpus % replica == 0,
        f"plan.gpus = {gpus} is not a multiple of plan.tp x plan.pp = {plan.tp} x {plan.pp} = {replica}.",
    )
    dp = gpus // replica
    require(
        dp % plan.ep == 0,
        f"plan.ep = {plan.ep} does not divide the replicas, plan.gpus / (tp x pp) = {gpus} / {replica} = {dp}.",
    )
    require(
        not model.is_moe or model.num_local_experts % plan.ep == 0,
        f"plan.ep = {plan.ep} does not divide model.num_local_experts = {model.num_local_experts}.",
    )
    require(model.is_moe or plan.ep == 1, f"plan.ep = {plan.ep} needs experts, and model.num_local_experts = 0.")
    require_tensor_parallel(model, plan.tp, "plan.tp")
    require(
        plan.pp * plan.interleave <= model.num_hidden_layers,
        f"plan.pp x plan.interleave = {plan.pp} x {plan.interleave} is more than model.num_hidden_layers = "
        f"{model.num_hidden_layers}.",
    )
    require(plan.interleave == 1 or plan.pp > 1, f"plan.interleave = {plan.interleave} needs a pipeline: plan.pp is 1.")
    group = plan.zero_group or dp
    require(dp % group == 0, f"plan.zero_group = {group} does not divide the replicas, {dp}.")
    rows = max(1, round(batch_tokens / sequence_length))
    per_replica = rows / dp
    require(
        per_replica >= plan.micro_batch,
        f"train.batch_tokens = {batch_tokens} are {rows} rows of {sequence_length}: fewer than one "
        f"micro-batch of plan.micro_batch = {plan.micro_batch} for each of {dp} replicas.",
    )
    micro_batches = max(1, round(per_replica / plan.micro_batch))
    return Layout(plan, gpus, dp, sequence_length, batch_tokens, micro_batches, optimizer)


def require_tensor_parallel(model: ModelConfig, tp: int, name: str) -> None:
    """Raise ConfigError where `tp` ranks cannot share the heads or the MLPs. Fewer key-value heads are replicated."""
    H, G = model.num_attention_heads, model.num_key_value_heads
    require(H % tp == 0, f"{name} = {tp} does not divide model.num_attention_heads = {H}.")
    require(
        G % tp == 0 or tp % G == 0,
        f"{name} = {tp} neither divides model.num_key_value_heads = {G} nor is a multiple of it.",
    )
    widths = {"intermediate_size": model.intermediate_size}
    if model.is_moe:
        widths["moe_intermediate_size"] = model.expert_size
    if model.mamba is not None:
        widths["hidden_size x mamba.expand"] = model.hidden_size * model.mamba.expand
    for field, width in widths.items():
        require(width % tp == 0, f"{name} = {tp} does not divide model.{field} = {width}.")


def require_serving(model: ModelConfig, plan: ServingPlan) -> None:
    """Raise ConfigError where the sizes of [serving] do not divide the model."""
    require_tensor_parallel(model, plan.tp, "serving.tp")
    require(
        plan.pp <= model.num_hidden_layers,
        f"serving.pp = {plan.pp} is more than model.num_hidden_layers = {model.num_hidden_layers}.",
    )
    experts = model.num_local_experts
    require(
        plan.ep == 1 or (model.is_moe and experts % plan.ep == 0),
        f"serving.ep = {plan.ep} does not divide model.num_local_experts = {experts}.",
    )


@functools.cache
def stages(model: ModelConfig, pp: int, interleave: int = 1) -> tuple[Stage, ...]:
    """The stages of a pipeline, their weights balanced: the first makes room for the table, the last for the output.

    With `interleave` each stage holds that many runs of consecutive layers, dealt in turn (Narayanan et al. 2021,
    section 2.2). The heaviest run is as light as can be, and the lighter ones come first: 120 equal layers over 16
    stages are 7 in each of the first seven and in the last, 8 in the others. Under 1F1B the first stages hold the
    activations of most micro-batches.
    """
    L, D, V = model.num_hidden_layers, model.hidden_size, model.vocab_size
    chunks = pp * interleave
    if not 1 <= chunks <= L:
        raise ConfigError(f"{pp} stages of {interleave} chunks cannot share {L} layers: lower pp or interleave.")
    positions = model.max_position_embeddings * D if model.block == "gpt2" else 0
    bounds = split(layer_weights(model), chunks, first=V * D + positions + vision_parameters(model), last=V * D)
    runs = [range(a, b) for a, b in itertools.pairwise(bounds)]
    return tuple(
        Stage(
            tuple(layer for chunk in range(stage, chunks, pp) for layer in runs[chunk]),
            embedding=stage == 0,
            output=stage == pp - 1,
        )
        for stage in range(pp)
    )


@functools.cache
def layer_weights(model: ModelConfig) -> tuple[int, ...]:
    """Weights of each layer."""
    return tuple(layer_parameters(model, layer).total for layer in range(model.num_hidden_layers))


def split(weights: Sequence[int], parts: int, first: int, last: int) -> list[int]:
    """Bounds of `parts` runs of `weights`, none empty: the heaviest as light as can be, then the lightest heavy.

    The first run carries `first` beside its own and the last `last`. Binary search over the heaviest, then over the
    lightest; among equals the first runs are the lighter ones.
    """
    total = sum(weights) + first + last
    limit = searched(max(weights), total, lambda limit: filled(weights, parts, first, last, limit) is not None)
    latest = filled(weights, parts, first, last, limit)
    assert latest is not None
    ends = list(itertools.accumulate(weights, initial=first))  # what all runs up to a bound hold
    ends[0], ends[-1] = 0, total
    mean = total // parts
    short = searched(0, mean, lambda short: thinned(ends, latest, limit, mean - short) is not None)
    bounds = thinned(ends, latest, limit, mean - short)
    assert bounds is not None
    return bounds


def searched(low: int, high: int, works: Callable[[int], bool]) -> int:
    """The smallest number from `low` to `high` that works, where all above it do and `high` does."""
    while low < high:
        middle = (low + high) // 2
        if works(middle):
            high = middle
        else:
            low = middle + 1
    return low


def thinned(ends: list[int], latest: list[int], limit: int, least: int) -> list[int] | None:
    """Bounds of runs from `least` to `limit`, each as short as can be from the front; None if there are none.

    `ends` has what all runs up to each bound hold. With `latest`, the bounds of runs filled from the back, a run may
    not end earlier: those after it could not take more. A single layer may exceed the limit.
    """
    bounds = [0]
    for earliest in latest[1:]:
        begin = bounds[-1]
        if begin + 1 == len(ends):
            return None
        end = max(earliest, bisect.bisect_left(ends, ends[begin] + least, begin + 1))
        if end == len(ends) or (end > begin + 1 and ends[end] - ends[begin] > limit):
            return None
        bounds.append(end)
    return bounds


def filled(weights: Sequence[int], parts: int, first: int, last: int, limit: int) -> list[int] | None:
    """Bounds of runs of at most `limit`, filled from the back; None if they do not suffice.

    A limit below the weight of the table alone, or of the output alone, still allows one layer beside it.
    """
    bounds, end = [len(weights)], len(weights)
    for part in reversed(range(parts)):
        extra = (last if part == parts - 1 else 0) + (first if part == 0 else 0)
        begin, held = end - 1, extra + weights[end - 1]
        while begin > part and held + weights[begin - 1] <= limit:
            begin -= 1
            held += weights[begin]
        if held > limit and end - begin > 1:
            return None
        bounds.append(begin)
        end = begin
    return bounds[::-1] if end == 0 else None
