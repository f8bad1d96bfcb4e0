"""Seconds that one rank spends on a forward pass of a few new tokens against a cache, part by part.

Prefill, decode and verification are all "n new tokens of each sequence at these positions against this cache", as in
the engine. D hidden width, F MLP width, H query heads, G key-value heads, C channels of a head, E experts, K experts
per token, V vocabulary, M rows (new tokens of all sequences).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from moe_lm.config import ModelConfig, ServingPlan
from moe_lm.scaling.collectives import all_gather, all_reduce, all_to_all
from moe_lm.scaling.constants import SCALE_BITS, SKINNY, TILE, WIDEN, Engine
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Kind, kind, require_serving, stages
from moe_lm.scaling.roofline import Cost, bounded, gemm, grouped_gemm, stream, width
from moe_lm.scaling.routing import expected_distinct, fullest_share


class Part(NamedTuple):
    """What one part of a pass costs a rank."""

    seconds: float
    flops: float = 0.0
    weights: float = 0.0
    """Bytes of weights that it reads."""
    cache: float = 0.0
    """Bytes of keys, values or states that it reads."""
    bound: str = "links"
    """compute, memory, launch, links or host: what takes most of the time."""


@dataclass(frozen=True)
class Pipeline:
    """The layers of a model over stages."""

    stages: tuple[tuple[dict[Kind, int], bool], ...]
    """What stages consist of, equal ones once: layers of each kind, and whether it has the output projection."""
    layers: dict[Kind, int]
    """Those of all stages."""


@cache
def pipeline(model: ModelConfig, tp: int, pp: int, ep: int) -> Pipeline:
    """The layers of each stage. Raises ConfigError where the sizes do not divide each other."""
    require_serving(model, ServingPlan(tp=tp, pp=pp, ep=ep))
    kinds = [kind(model, layer) for layer in range(model.num_hidden_layers)]
    distinct: list[tuple[dict[Kind, int], bool]] = []
    for stage in stages(model, pp):
        held = (dict(Counter(kinds[layer] for layer in stage.layers)), stage.output)
        if held not in distinct:
            distinct.append(held)
    return Pipeline(tuple(distinct), dict(Counter(kinds)))


@dataclass(frozen=True)
class Forward:
    """A pass of `tokens` new tokens for each of `sequences` that have `context` cached ones, on one rank of each stage.

    Sequences are those of the busiest of the plan's ep ranks, `everywhere` those of all. All numbers may be averages.
    """

    model: ModelConfig
    plan: ServingPlan
    machine: Machine
    engine: Engine
    sequences: float
    everywhere: float
    tokens: float
    context: float

    @cached_property
    def rows(self) -> float:
        return self.sequences * self.tokens

    @cached_property
    def residual(self) -> float:
        """Bytes of a number of the residual stream: two beside products in float8."""
        return max(2.0, width(self.plan.dtype))

    def layer(self, kind: Kind) -> dict[str, Part]:
        """The parts of one layer."""
        parts = self.attention() if kind.attends else self.mamba()
        reduces = 2
        if kind.crosses:
            parts["cross-attention"] = self.cross_attention()
            reduces += 2
        parts.update(self.experts() if kind.routes else {"mlp": self.mlp(self.model.intermediate_size)})
        parts["norms"] = self.elementwise()
        if self.plan.tp > 1:
            parts["all-reduce"] = Part(reduces * self.reduce())
        return parts

    def output(self, rows: float) -> dict[str, Part]:
        """The projection of `rows` to the vocabulary, and its gathering over ranks."""
        D, V, tp = self.model.hidden_size, self.model.vocab_size, self.plan.tp
        parts = {"output": self.product(rows, math.ceil(V / tp), D, kept=True)}
        if tp > 1:
            parts["all-reduce"] = Part(all_gather(self.machine, rows * V * 2, tp))
        return parts

    def attention(self) -> dict[str, Part]:
        model, tp, M = self.model, self.plan.tp, self.rows
        D, H, C = model.hidden_size, model.num_attention_heads // tp, model.head_dim
        if model.mla is not None:
            return self.latent_attention(H)
        G = max(1, model.num_key_value_heads // tp)  # fewer heads than ranks: each rank has one whole
        projections = summed([self.product(M, (H + 2 * G) * C, D), self.product(M, D, H * C)])
        return {"projections": projections, "attention": self.attend(H, G, 2 * G * C, 2 * H * C)}

    def latent_attention(self, H: int) -> dict[str, Part]:
        """Queries absorb the expansion of keys, and outputs that of values, where that is fewer operations: in decode.

        DeepSeek-V2, section 2.1.2. The compressed cache is whole on every rank.
        """
        model, mla, M = self.model, self.model.mla, self.rows
        D, rank, rotated = model.hidden_size, mla.kv_lora_rank, mla.qk_rope_head_dim
        queried, expanded = H * (mla.qk_nope_head_dim + rotated), H * (mla.qk_nope_head_dim + mla.v_head_dim)
        queries = [self.product(M, queried, mla.q_lora_rank or D)]
        if mla.q_lora_rank:
            queries.append(self.product(M, mla.q_lora_rank, D))
        products = [
            *queries, self.product(M, rank + rotated, D), self.product(M, expanded, rank),
            self.product(M, D, H * mla.v_head_dim),
        ]  # fmt: skip
        absorbed = H * (2 * rank + rotated)
        plain = queried + H * mla.v_head_dim
        seen = self.context + (self.tokens + 1) / 2
        again = 2 * self.context * rank * expanded / self.tokens  # cached keys are expanded once for all new tokens
        flops_absorbed, flops_plain = 2 * absorbed * seen, 2 * plain * seen + again
        channels = absorbed if flops_absorbed <= flops_plain else flops_plain / (2 * seen)
        return {"projections": summed(products), "attention": self.attend(H, 1, rank + rotated, channels)}

    def attend(self, heads: int, groups: int, cached: float, channels: float) -> Part:
        """Scores and weighted values of queries that meet `channels` per token of context, of which `cached` are read.

        The queries of a group are the rows of one product, padded to the tile.
        """
        machine, sheet = self.machine, self.machine.sheet
        dtype = "bfloat16" if self.plan.dtype == "float8" else self.plan.dtype
        held = self.context + self.tokens
        nbytes = self.sequences * held * cached * self.plan.kv_bits / 8
        if not self.engine.grouped:
            nbytes *= heads / groups
        flops = 2 * self.rows * (self.context + (self.tokens + 1) / 2) * channels
        queries = self.tokens * heads / groups
        compute = flops * padding(machine, queries) / (sheet.peak(dtype) * machine.reached.attention)
        cost = bounded(machine, flops, nbytes, compute)
        return Part(cost.seconds, cost.flops, 0.0, nbytes, cost.bound)

    def mamba(self) -> dict[str, Part]:
        """Projections as in counts.mamba_parameters. States, in float32, and inputs of the convolution are read and
        written."""
        model, mamba, tp, M = self.model, self.model.mamba, self.plan.tp, self.rows
        D, inner = model.hidden_size, mamba.expand * model.hidden_size // tp
        rank, states = mamba.dt_rank, mamba.d_state
        products = [self.product(M, 2 * inner, D), self.product(M, rank + 2 * states, inner),
                    self.product(M, inner, rank), self.product(M, D, inner)]  # fmt: skip
        state = self.sequences * inner * (4 * states + self.residual * mamba.d_conv)
        flops = 9 * M * inner * states
        scan = bounded(self.machine, flops, 2 * state, flops / self.machine.sheet.peak("float32"))
        return {"projections": summed(products), "mamba": Part(scan.seconds, flops, 0.0, state, scan.bound)}

    def cross_attention(self) -> Part:
        """The products of the text; keys and values of an image come with its prefill and are not counted."""
        model, tp, M = self.model, self.plan.tp, self.rows
        D, HC = model.hidden_size, model.num_attention_heads * model.head_dim // tp
        F = (model.vision.cross_attention_intermediate_size or 4 * D) // tp
        return summed([self.product(M, HC, D), self.product(M, D, HC), self.product(M, F, D), self.product(M, D, F)])

    def mlp(self, size: int) -> Part:
        D, F, M = self.model.hidden_size, size // self.plan.tp, self.rows
        gated = 1 if self.model.block == "gpt2" else 2
        return summed([self.product(M, gated * F, D), self.product(M, D, F)])

    def experts(self) -> dict[str, Part]:
        """Router, routed and shared experts, on the fullest of the ranks that share the experts."""
        model, plan, M = self.model, self.plan, self.rows
        D, F, E, K, ep = (
            model.hidden_size,
            model.expert_size,
            model.num_local_experts,
            model.num_experts_per_tok,
            plan.ep,
        )
        tokens = self.everywhere * self.tokens
        tokens *= fullest_share(E, K, tokens, ep)
        hit = expected_distinct(E, K, tokens) / ep
        each = tokens * K / ep / hit
        F = F // plan.tp
        routed = summed([self.grouped(hit, each, 2 * F, D), self.grouped(hit, each, D, F)])
        # Top-k and sorting, gathering of rows, activation and the weighted sum: a launch each.
        moved = stream(self.machine, tokens * K / ep * (3 * D + 3 * F) * self.residual, launches=4)
        routed = summed([routed, Part(moved.seconds, 0.0, 0.0, 0.0, moved.bound)])
        parts = {"router": self.product(M, E, D, kept=True), "experts": routed}
        if model.n_shared_experts:
            parts["mlp"] = self.mlp(model.n_shared_experts * model.expert_size)
        if ep > 1:
            there, back = (M * K * D * size / plan.tp for size in (width(plan.dtype), self.residual))
            ways = (all_to_all(self.machine, nbytes, ep, stride=plan.tp) for nbytes in (there, back))
            parts["all-to-all"] = Part(sum(ways))
        return parts

    def elementwise(self) -> Part:
        """Two norms with their residual sums, rotation with the write to the cache, the gate of a dense MLP."""
        model, tp = self.model, self.plan.tp
        heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim / tp
        numbers = self.rows * (8 * model.hidden_size + 2 * heads + 3 * model.intermediate_size / tp)
        cost = stream(self.machine, numbers * self.residual, launches=4)
        return Part(cost.seconds, 0.0, 0.0, 0.0, cost.bound)

    def reduce(self) -> float:
        """Seconds of one all-reduce of the residual over the tensor-parallel ranks.

        In a node the links' rate and one latency, as all ranks read from all at once; beyond it, rings.
        """
        tp, sheet = self.plan.tp, self.machine.sheet
        nbytes = self.rows * self.model.hidden_size * self.residual
        if tp > sheet.gpus_per_node:
            return all_reduce(self.machine, nbytes, tp)
        return self.engine.message + 2 * nbytes * (tp - 1) / tp / (sheet.nvlink * self.machine.reached.links)

    def product(self, rows: float, n: int, k: int, kept: bool = False) -> Part:
        """(rows, K) x (K, N). A few rows take the kernels for few rows, which fill the device by splitting K.

        `kept` weights, of the router and the output, have at least 16 bits, as in the common quantised checkpoints.
        """
        plan, machine = self.plan, self.machine
        dtype, bits = plan.dtype, plan.weight_bits
        if kept:
            dtype, bits = "bfloat16" if dtype == "float8" else dtype, max(16, bits)
        stored = bits + SCALE_BITS[bits]
        if rows > TILE:
            cost = gemm(machine, rows, n, k, dtype=dtype, weight_bits=stored)
        else:
            flops = 2 * rows * n * k
            compute = flops * padding(machine, rows) / (machine.sheet.peak(dtype) * machine.reached.gemm)
            cost = few_rows(machine, flops, n * k * stored / 8 + rows * (n + k) * self.residual, compute)
        return self.widened(cost, n * k, stored, bits < 8 * width(dtype))

    def grouped(self, experts: float, rows: float, n: int, k: int) -> Part:
        """`experts` products (rows, K) x (K, N) in one launch."""
        plan, machine = self.plan, self.machine
        bits = plan.weight_bits + SCALE_BITS[plan.weight_bits]
        if rows > TILE:
            cost = grouped_gemm(machine, [rows] * round(experts), n, k, dtype=plan.dtype, weight_bits=bits)
        else:
            flops = 2 * experts * rows * n * k
            compute = flops * padding(machine, rows) / (machine.sheet.peak(plan.dtype) * machine.reached.gemm)
            nbytes = experts * (n * k * bits / 8 + rows * (n + k) * self.residual)
            cost = few_rows(machine, flops, nbytes, compute)
        return self.widened(cost, experts * n * k, bits, plan.weight_bits < 8 * width(plan.dtype))

    def widened(self, cost: Cost, weights: float, stored: float, narrow: bool) -> Part:
        """`cost` of a product with weights of `stored` bits, and the time to widen them where they are too `narrow`."""
        seconds = cost.seconds
        if narrow:
            seconds += weights * WIDEN / self.machine.sheet.peak("float32")
        return Part(seconds, cost.flops, weights * stored / 8, 0.0, cost.bound)


def few_rows(machine: Machine, flops: float, nbytes: float, compute: float) -> Cost:
    """A product with few rows. A GPU reads while it multiplies; a core of a processor does one after the other.

    On a core of an AMD EPYC our decoder took 71, 93, 147 and 260 us for 1, 4, 8 and 16 rows of an MLP of 3 MB: 58 for
    its weights, 13 for each row.
    """
    if machine.sheet.family != "cpu":
        return bounded(machine, flops, nbytes, compute)
    reading = bounded(machine, flops, nbytes, 0.0)
    return replace(reading, seconds=reading.seconds + compute)


def padding(machine: Machine, rows: float) -> float:
    """What the tiles of a product with few rows compute, as a multiple of what is asked."""
    if machine.sheet.family == "cpu":
        return 1.0
    return SKINNY * math.ceil(rows / SKINNY) / rows


def summed(parts: list[Part]) -> Part:
    """Parts one after the other, bound by what bounds the longest."""
    seconds = flops = weights = cached = 0.0
    longest = parts[0]
    for part in parts:
        seconds += part.seconds
        flops += part.flops
        weights += part.weights
        cached += part.cache
        if part.seconds > longest.seconds:
            longest = part
    return Part(seconds, flops, weights, cached, longest.bound)
