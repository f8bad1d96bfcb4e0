"""Bytes on a GPU: of each pipeline stage in training, of the fullest one in serving, and what to turn if they are many.

N tokens of a micro-batch, D hidden width, V vocabulary, L layers, p pipeline stages, v chunks of layers on a stage,
m micro-batches of a step.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moe_lm.config import ModelConfig, ServingPlan, TrainingPlan
from moe_lm.scaling.activations import activation_width, layer_activations
from moe_lm.scaling.constants import FRAGMENTATION, GRADIENT_BYTES, PREFILL_TOKENS, RUNTIME_BYTES, SCALE_BITS
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Layout, first_alike, require_serving, stages
from moe_lm.scaling.shards import (
    Shape,
    end_shapes,
    expert_shapes,
    kv_heads,
    layer_shapes,
    numbers,
    vocabulary_rows,
)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage in training."""

    weights: float
    """Two bytes each, four in float32; what a rank keeps of them under ZeRO-3."""
    gradients: float
    """constants.GRADIENT_BYTES each, four in float32."""
    optimizer: float
    """Adam's two float32 moments and, unless weights are float32, a float32 copy of the weights."""
    activations: float
    """Of all micro-batches in flight, and of the layer whose backward runs."""
    buffers: float
    """Weights gathered and gradients not yet scattered, messages between stages, logits."""
    overhead: float
    """The runtime's own memory, and what the allocator loses."""
    limit: float
    """Bytes of the device."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on each GPU of the fullest pipeline stage in serving."""

    batch: int
    """Requests in flight, over all ranks."""
    context: int
    """Tokens of each in the cache."""
    weights: float
    """With their scales."""
    mean_weights: float
    """The mean over stages, where layers do not divide evenly."""
    cache: float
    """Keys and values, or what latent attention keeps of them."""
    replicated_cache: float
    """The part of `cache` that perfect sharding over tensor-parallel ranks would spare: copies of one head."""
    state: float
    """States of Mamba: float32, and the 16-bit inputs of its convolution."""
    buffers: float
    """Activations of one layer in the largest step, and logits."""
    overhead: float
    """The runtime's own memory, and what the allocator loses."""
    limit: float
    """Bytes of the device."""

    @property
    def per_gpu(self) -> float:
        return self.weights + self.cache + self.state + self.buffers + self.overhead

    @property
    def fits(self) -> bool:
        return self.per_gpu <= self.limit


class StageWeights(NamedTuple):
    """What a rank of one stage would hold if replicas shared nothing; numbers of weights."""

    layers: tuple[tuple[int, int], ...]
    """A layer of each kind on the stage, and how many of that kind."""
    shared: int
    """Weights that all replicas have."""
    experts: int
    """Weights that one in `ep` replicas has."""
    largest: int
    """Weights of its largest layer."""
    output: bool


@functools.cache
def stage_weights(model: ModelConfig, pp: int, interleave: int, tp: int, ep: int) -> tuple[StageWeights, ...]:
    """Weights of the stages; layers of one kind are counted once."""
    kinds = first_alike(model)
    sizes = {
        layer: (numbers(layer_shapes(model, layer, tp)), numbers(expert_shapes(model, layer, tp, ep)))
        for layer in set(kinds)
    }
    held = []
    for stage in stages(model, pp, interleave):
        layers = Counter(kinds[layer] for layer in stage.layers)
        shared, experts = (sum(sizes[kind][i] * count for kind, count in layers.items()) for i in (0, 1))
        shared += numbers(end_shapes(model, tp, stage))
        largest = max(sum(sizes[kind]) for kind in layers)
        held.append(StageWeights(tuple(layers.items()), shared, experts, largest, stage.output))
    return tuple(held)


@functools.cache
def first_stages(model: ModelConfig, pp: int, interleave: int, tp: int, ep: int) -> tuple[int, ...]:
    """For each weight that stages have, the first of them."""
    first: dict[StageWeights, int] = {}
    for number, held in enumerate(stage_weights(model, pp, interleave, tp, ep)):
        first.setdefault(held, number)
    return tuple(first.values())


def training_memory(model: ModelConfig, layout: Layout, machine: Machine) -> tuple[StageMemory, ...]:
    """Bytes on a GPU of each stage, at the fullest moment of a step.

    Optimizer: AdamW. ZeRO shards over `zero_group` replicas, experts over those of them that hold the same ones; ZeRO-3
    gathers two layers at once, the one at work and the next; ZeRO-2 and 3 have one layer's gradients whole.
    """
    return tuple(stage_memories(model, layout, machine, range(layout.plan.pp)))


def fullest_stage(model: ModelConfig, layout: Layout, machine: Machine) -> StageMemory:
    """That of training_memory with most bytes. Of stages that hold as much, the first has most micro-batches."""
    plan = layout.plan
    first = first_stages(model, plan.pp, plan.interleave, plan.tp, plan.ep)
    return max(stage_memories(model, layout, machine, first), key=lambda memory: memory.total)


def stage_memories(model: ModelConfig, layout: Layout, machine: Machine, which: Iterable[int]) -> Iterator[StageMemory]:
    """Bytes of the stages of these numbers, from 0."""
    plan = layout.plan
    width = 4 if plan.dtype == "float32" else 2
    gradient = 4 if plan.dtype == "float32" else GRADIENT_BYTES
    states = 8 if plan.dtype == "float32" else 12
    group = layout.zero_group
    expert_group = max(1, group // plan.ep)
    cut = {
        kind: layer_activations(
            model, kind, plan, layout.micro_tokens, layout.sequence_length, machine.reached.imbalance
        )
        for kind in set(first_alike(model))
    }
    weights_of = stage_weights(model, plan.pp, plan.interleave, plan.tp, plan.ep)
    for number in which:
        held = weights_of[number]
        whole = held.shared + held.experts
        sharded = held.shared / group + held.experts / expert_group
        weights = width * (sharded if plan.zero == 3 else whole)
        gradients = gradient * (sharded if plan.zero >= 2 else whole)
        gathered = min(2 * held.largest * width, whole * width - weights)
        unscattered = min(held.largest * gradient, whole * gradient - gradients)
        kept = sum(cut[kind].kept * count for kind, count in held.layers)
        activations = in_flight(layout, number) * kept + max(cut[kind].working for kind, _ in held.layers)
        buffers = gathered + unscattered + message_bytes(model, layout)
        if held.output:
            buffers += output_bytes(model, layout)
        yield StageMemory(
            weights=weights,
            gradients=gradients,
            optimizer=states * (sharded if plan.zero >= 1 else whole),
            activations=activations,
            buffers=buffers,
            overhead=runtime_bytes(machine) + FRAGMENTATION * activations,
            limit=machine.sheet.memory,
        )


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations stage `stage` of p, from 0, keeps at once; v chunks count as one.

    1F1B keeps p - stage. Interleaved, a stage runs ahead by 2 (p - stage - 1) + (v - 1) p chunks before its first
    backward (Narayanan et al. 2021, section 2.2), on stage 0 (p - 1) / (p v) more than without.
    """
    p, v, m = layout.plan.pp, layout.plan.interleave, layout.micro_batches
    if v == 1:
        return min(m, p - stage)
    return min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1) / v


def message_bytes(model: ModelConfig, layout: Layout) -> float:
    """Activations and gradients that arrive from the neighbouring stages while others are at work."""
    plan = layout.plan
    ranks = plan.tp if plan.sequence_parallel else 1
    return 2 * layout.micro_tokens * model.hidden_size * activation_width(plan) / ranks if plan.pp > 1 else 0.0


def output_bytes(model: ModelConfig, layout: Layout) -> float:
    """Logits as they are multiplied and in float32, whose place their gradient takes; the last norm's in- and output.

    Korthikanti et al. 2022, section 4.3, with the logits' own dtype added.
    """
    plan, width = layout.plan, activation_width(layout.plan)
    ranks = plan.tp if plan.sequence_parallel else 1
    logits = vocabulary_rows(model.vocab_size, plan.tp) * (width + 4 if width < 4 else 4)
    return layout.micro_tokens * (logits + 2 * model.hidden_size * width / ranks)


def runtime_bytes(machine: Machine) -> float:
    """What is gone before the first tensor."""
    return 0.0 if machine.sheet.family == "cpu" else RUNTIME_BYTES


def serving_memory(
    model: ModelConfig, plan: ServingPlan, machine: Machine, *, batch: int, context: int
) -> ServingMemory:
    """Bytes on a GPU of the fullest stage while `batch` requests hold `context` tokens each in the cache.

    Every stage keeps the cache of all requests, for its layers; `ep` ranks share them. Projections of
    fewer bits come with constants.SCALE_BITS; embeddings, output, router and norms keep 16. A draft model is not
    counted. Raises ConfigError where sizes do not divide.
    """
    require_serving(model, plan)
    requests = math.ceil(batch / plan.ep)
    stage_sizes = serving_stages(model, plan.pp, plan.tp, plan.ep, plan.weight_bits)
    per_token, perfect = (numbers * plan.kv_bits / 8 for numbers in token_numbers(model, plan.tp))
    per_state = state_bytes(model, plan.tp)
    weights, attending, mamba = max(
        stage_sizes, key=lambda size: size[0] + requests * (size[1] * context * per_token + size[2] * per_state)
    )
    buffers = serving_buffers(model, plan, requests, machine.reached.imbalance)
    return ServingMemory(
        batch=batch,
        context=context,
        weights=weights,
        mean_weights=sum(size[0] for size in stage_sizes) / plan.pp,
        cache=requests * context * attending * per_token,
        replicated_cache=requests * context * attending * (per_token - perfect),
        state=requests * mamba * per_state,
        buffers=buffers,
        overhead=runtime_bytes(machine) + FRAGMENTATION * buffers,
        limit=machine.sheet.memory,
    )


def largest_batch(model: ModelConfig, plan: ServingPlan, machine: Machine, context: int) -> int:
    """Most requests of `context` tokens, over all ranks, that fit; 0 if not even one for each of `ep` ranks does."""

    def fits(requests: int) -> bool:
        return serving_memory(model, plan, machine, batch=requests * plan.ep, context=context).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * plan.ep


@functools.cache
def serving_stages(model: ModelConfig, pp: int, tp: int, ep: int, bits: int) -> tuple[tuple[float, int, int], ...]:
    """Of each stage: bytes of weights with their scales, layers with attention, layers of Mamba."""
    kinds = first_alike(model)
    sizes = {
        layer: quantized_bytes(layer_shapes(model, layer, tp) | expert_shapes(model, layer, tp, ep), bits)
        for layer in set(kinds)
    }
    held = []
    for stage in stages(model, pp):
        attending = sum(model.attends(layer) for layer in stage.layers)
        ends = numbers(end_shapes(model, tp, stage)) * max(16, bits) / 8
        weights = ends + sum(sizes[kinds[layer]] for layer in stage.layers)
        held.append((weights, attending, len(stage.layers) - attending))
    return tuple(held)


def quantized_bytes(shapes: dict[str, Shape], bits: int) -> float:
    """Bytes of a layer's weights: the projections in `bits` with scales, all else in 16 or more."""
    projections = sum(math.prod(shape) for name, shape in shapes.items() if "proj" in name and len(shape) > 1)
    return (projections * (bits + SCALE_BITS[bits]) + (numbers(shapes) - projections) * max(16, bits)) / 8


def token_numbers(model: ModelConfig, tp: int) -> tuple[float, float]:
    """Numbers that a rank's cache holds per token and layer with attention; and if nothing were held twice."""
    if model.mla is not None:
        latent = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        return latent, latent / tp
    per_head = 2 * model.head_dim
    return kv_heads(model, tp) * per_head, model.num_key_value_heads * per_head / tp


def state_bytes(model: ModelConfig, tp: int) -> float:
    """Bytes of a request in a layer of Mamba on a rank: states in float32, inputs of the convolution in 16 bits."""
    if model.mamba is None:
        return 0.0
    return model.mamba.expand * model.hidden_size / tp * (4 * model.mamba.d_state + 2 * model.mamba.d_conv)


def serving_buffers(model: ModelConfig, plan: ServingPlan, requests: int, imbalance: float) -> float:
    """Activations of one layer in the largest step, a chunk of a prompt or a decode of a stage's share; and logits."""
    decoding = math.ceil(requests / plan.pp) * (1 + plan.draft_tokens)
    tokens = max(decoding, min(plan.prompt_tokens, PREFILL_TOKENS))
    alike = TrainingPlan(tp=plan.tp, ep=plan.ep, recompute="none", sequence_parallel=False, dtype=plan.dtype)
    layer = max(
        layer_activations(model, kind, alike, tokens, tokens, imbalance).kept for kind in set(first_alike(model))
    )
    return layer + 4 * decoding * vocabulary_rows(model.vocab_size, plan.tp)
