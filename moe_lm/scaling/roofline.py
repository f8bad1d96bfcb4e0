"""Seconds of one operation on one device: the longer of its arithmetic and its memory traffic.

M rows, N columns, K inner elements of a product.
"""

import math
from dataclasses import dataclass

from moe_lm.scaling.constants import TILE
from moe_lm.scaling.hardware import Machine


@dataclass(frozen=True)
class Cost:
    """One operation, or several together."""

    seconds: float
    flops: float
    """What the operation asks for: padding does not count."""
    bytes: float
    """What crosses the memory's bus."""
    bound: str
    """compute, memory or launch: what takes most of the time."""


def gemm(
    machine: Machine, m: float, n: int, k: int, *, dtype: str = "bfloat16", weight_bits: int = 16, copies: int = 1
) -> Cost:
    """`copies` products (M, K) x (K, N) of activations in `dtype` with weights of `weight_bits`, one after another.

    Tiles at the ragged edges and the last, partly filled wave of tiles cost as whole ones (quantisation of tiles and
    waves: NVIDIA, Matrix Multiplication Background, section 3).
    """
    sheet, reached = machine.sheet, machine.reached
    tiles = math.ceil(m / TILE) * math.ceil(n / TILE)
    waves = math.ceil(tiles / sheet.units)
    padded = 2 * waves * sheet.units * TILE * TILE * k if sheet.family != "cpu" else 2 * m * n * k
    compute = padded / (sheet.peak(dtype) * reached.gemm)
    nbytes = n * k * weight_bits / 8 + m * (n + k) * width(dtype)
    once = bounded(machine, 2 * m * n * k, nbytes, compute)
    return once if copies == 1 else together([once] * copies)


def grouped_gemm(
    machine: Machine, rows: list[float], n: int, k: int, *, dtype: str = "bfloat16", weight_bits: int = 16
) -> Cost:
    """One launch of products (rows[e], K) x (K, N), an expert each; an expert without rows is not read."""
    sheet, reached = machine.sheet, machine.reached
    tiles = sum(math.ceil(m / TILE) for m in rows) * math.ceil(n / TILE)
    flops = 2 * sum(rows) * n * k
    padded = flops
    if sheet.family != "cpu":
        padded = 2 * math.ceil(tiles / sheet.units) * sheet.units * TILE * TILE * k
    nbytes = sum(m > 0 for m in rows) * n * k * weight_bits / 8 + sum(rows) * (n + k) * width(dtype)
    return bounded(machine, flops, nbytes, padded / (sheet.peak(dtype) * reached.gemm * reached.grouped))


def attention(machine: Machine, flops: float, nbytes: float, *, dtype: str = "bfloat16") -> Cost:
    """Scores and weighted values, fused: `flops` of them, over `nbytes` of queries, keys, values and outputs."""
    return bounded(machine, flops, nbytes, flops / (machine.sheet.peak(dtype) * machine.reached.attention))


def stream(machine: Machine, nbytes: float, launches: int = 1) -> Cost:
    """Kernels that do nothing but read and write `nbytes`."""
    cost = bounded(machine, 0, nbytes, 0)
    extra = (launches - 1) * machine.reached.launch
    return Cost(cost.seconds + extra, 0, nbytes, cost.bound)


def bounded(machine: Machine, flops: float, nbytes: float, compute: float) -> Cost:
    """The cost of one launch that computes for `compute` seconds, if nothing else holds it up."""
    sheet, reached = machine.sheet, machine.reached
    memory = nbytes / (sheet.bandwidth * reached.bandwidth)
    times = {"compute": compute, "memory": memory, "launch": reached.launch}
    return Cost(max(compute, memory) + reached.launch, flops, nbytes, max(times, key=times.__getitem__))


def together(costs: list[Cost]) -> Cost:
    """Costs one after the other, bound by what bounds most of their time."""
    share: dict[str, float] = {}
    for cost in costs:
        share[cost.bound] = share.get(cost.bound, 0) + cost.seconds
    bound = max(share, key=share.__getitem__) if share else "launch"
    return Cost(sum(c.seconds for c in costs), sum(c.flops for c in costs), sum(c.bytes for c in costs), bound)


def width(dtype: str) -> float:
    """Bytes of a number in `dtype`."""
    return {"float32": 4, "tensorfloat32": 4, "bfloat16": 2, "float16": 2, "float8": 1}[dtype]
