"""What every operation must do at least: FLOPs without padding, and bytes with each input read and each output written
once. Rates, predicted or measured, are these counts over time; intermediate results do not count.

N tokens, S slots, D hidden width, F expert width, E experts, V vocabulary; B sequences of T tokens, H query heads,
G key-value heads, C channels of a head.
"""

from typing import NamedTuple

from kernels.bench.distributions import loads
from kernels.bench.shapes import Shape


class Cost(NamedTuple):
    flops: float
    bytes: float


def cost(op: str, shape: Shape, itemsize: int = 2) -> Cost:
    """Of one call of `op` on elements of `itemsize` bytes."""
    N, S, D, F, E = shape.tokens, shape.slots, shape.hidden, shape.intermediate, shape.experts
    B, T, H, G, C = shape.batch, shape.context, shape.heads, shape.kv_heads, shape.head_dim
    queries = B * shape.queries
    if op in ("grouped_gemm", "expert_mlp", "expert_mlp_backward", "expert_mlp_training"):
        rows = loads(shape.distribution, N, E, shape.top_k, shape.seed)
        active = sum(1 for n in rows if n) * D * F  # elements of a matrix per chosen expert
        flops, elements = {
            "grouped_gemm": (2 * S * D * F, S * (D + F) + active),
            "expert_mlp": (6 * S * D * F, 2 * N * D + 3 * active),
            "expert_mlp_backward": (12 * S * D * F, 3 * N * D + 3 * active + 3 * E * D * F),
            "expert_mlp_training": (18 * S * D * F, 5 * N * D + 6 * active + 3 * E * D * F),
        }[op]
        return Cost(flops, elements * itemsize)
    rows_of = shape.sequence
    flops, nbytes = {
        "paged_attention": (4 * queries * H * C * T, (2 * B * G * T * C + 2 * queries * H * C) * itemsize),
        "paged_attention_int8": (
            4 * queries * H * C * T, 2 * B * G * T * (C + 4) + 2 * queries * H * C * itemsize,
        ),
        "attention": (2 * N * H * C * rows_of, 2 * N * (H + G) * C * itemsize),
        "rms_norm": (4 * N * D, 2 * N * D * itemsize),
        "rope": (3 * N * H * C, 2 * N * H * C * itemsize + 4 * N * C),
        "rope_append": (3 * queries * (H + G) * C, 2 * queries * (H + 2 * G) * C * itemsize + 4 * queries * C),
        "swiglu": (4 * N * F, 3 * N * F * itemsize),
        "gate": (2 * N * D * E, N * D * itemsize + 4 * (N + D) * E),
        "route": (0, 4 * N * E + 20 * S),
        "router_statistics": (0, 4 * N * E),
        "cross_entropy": (6 * N * D * shape.vocab, 2 * (N + shape.vocab) * D * itemsize),
    }[op]  # fmt: skip
    return Cost(flops, nbytes)
