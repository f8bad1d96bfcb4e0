"""Seconds of the optimizer's own work in a step: AdamW, or Muon for the matrices of the blocks.

M rows and N columns of a matrix, M the smaller.
"""

import math
from functools import lru_cache

from moe_lm.config import ModelConfig
from moe_lm.scaling.constants import ADAMW_BYTES, CAST_BYTES, GRADIENT_PASSES, MUON_BYTES, NEWTON_SCHULZ_STEPS
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Layout
from moe_lm.scaling.roofline import stream, width
from moe_lm.scaling.shards import expert_shapes, layer_shapes


def optimizer_seconds(
    model: ModelConfig,
    layers: tuple[tuple[int, int], ...],
    dense: float,
    experts: float,
    layout: Layout,
    machine: Machine,
) -> float:
    """Seconds on a rank of a stage that holds `dense` and `experts` weights before any splitting.

    `layers` are the first layer of each kind, and how many of that kind the stage has. ZeRO splits the work over its
    group.
    """
    plan = layout.plan
    own = MUON_BYTES if layout.optimizer == "muon" else ADAMW_BYTES
    seconds = 0.0
    for weights, replicas in (
        (dense / plan.tp, layout.dp),
        (experts / plan.tp / plan.ep, layout.dp // plan.ep),
    ):
        shards = min(replicas, layout.zero_group)
        shard = weights / shards if plan.zero else weights
        nbytes = own * shard + GRADIENT_PASSES * (shard if plan.zero >= 2 else weights)
        seconds += stream(machine, nbytes).seconds
    if machine.sheet.family == "cpu" and width(plan.dtype) < 4:
        seconds += stream(machine, CAST_BYTES * machine.reached.passes * (dense + experts)).seconds
    if layout.optimizer == "muon":
        flops = sum(count * orthogonalisation_flops(model, layer, layout.expert_ns_steps) for layer, count in layers)
        split = plan.tp * (layout.zero_group if plan.zero else 1)
        # Small products side by side, as the experts' are.
        rate = machine.sheet.peak(plan.dtype) * machine.reached.gemm * machine.reached.grouped
        seconds += flops / split / rate
    return seconds


@lru_cache(maxsize=512)
def orthogonalisation_flops(model: ModelConfig, layer: int, expert_steps: float) -> float:
    """FLOP that Newton-Schulz takes for every matrix of a block but the router's, `expert_steps` for experts'.

    A step multiplies X X^T, its square, and that with X: 4 M^2 N + 2 M^3. Queries, keys and values are matrices of
    their own, as are gate and up, and the experts.
    """
    shapes = layer_shapes(model, layer, 1) | expert_shapes(model, layer, 1, 1)
    G, C = model.num_key_value_heads, model.head_dim
    flops = 0.0
    for name, shape in shapes.items():
        if len(shape) < 2 or name == "mlp.gate.weight":
            continue
        *stack, rows, columns = shape
        parts = [rows]
        if "qkv_proj" in name:
            parts = [rows - 2 * G * C, G * C, G * C]
        elif "gate_up_proj" in name:
            parts = [rows // 2] * 2
        for part in parts:
            M, N = sorted((part, columns))
            steps = expert_steps if stack else NEWTON_SCHULZ_STEPS
            flops += math.prod(stack) * steps * (4 * M * M * N + 2 * M**3)
    return flops
