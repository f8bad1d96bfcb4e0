"""The cost of a kernel from its tiles: cycles of a step, waves of tiles, L2 and HBM (docs/kernels.md, Prediction).

A step takes the slowest of tensor cores, instruction issue, shared memory and L2; a tile its steps and, once, the first
fetch and the last store; a kernel the waves in which its tiles fit the GPU, the last one maybe of half tiles, or the
time that HBM needs for its bytes, whichever is longer, and a launch.

M rows, N columns and K inner elements of a tile; all elements have two bytes.
"""

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from kernels.bench import constants
from kernels.bench.constants import HBM_SHARE, INSTRUCTIONS, LAUNCH, SCHEDULERS, SHARED_BYTES_PER_CLOCK, Gpu
from kernels.tiles import whole_tiles


class Tile(NamedTuple):
    """What a program multiplies in a step, and how many programs share an SM."""

    kind: str
    """Key of INSTRUCTIONS: gemm, wgrad, decode or attention."""
    m: int
    n: int
    k: int
    warps: int
    stages: int
    occupancy: int
    swap: bool = False
    """Whether the N side is the left operand of the matrix instruction."""
    halves: bool = False
    """Whether a last round that would leave half of the GPU idle is computed in tiles of half the columns."""

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


class Kernel(NamedTuple):
    """The predicted cost of one launch, or of several together."""

    name: str
    seconds: float
    flops: float
    """That the operation asks for: padding does not count."""
    bytes: float
    """That cross HBM if every operand does once."""
    bound: str
    """tensor, issue, shared, L2 or HBM."""
    note: str = ""


def warpgroups(arch: int, m: int, warps: int) -> bool:
    """Whether a product runs on Hopper's warpgroup instructions, which read both operands from shared memory."""
    return arch >= 90 and m % (16 * warps) == 0


def operand_bytes(arch: int, m: int, n: int, k: int, warps: int) -> float:
    """Bytes that the matrix instructions of a step read from shared memory."""
    if warpgroups(arch, m, warps):
        return m // 64 * math.ceil(n / 256) * (64 + min(n, 256)) * k * 2
    down = min(splits(m, n, warps), key=lambda down: m / down + n * down / warps)
    return warps * (m / down + n * down / warps) * k * 2


def splits(m: int, n: int, warps: int) -> list[int]:
    """Ways to stack warps over the rows of a tile; each needs 16 rows and 8 columns of its own."""
    powers = [1 << i for i in range(warps.bit_length())]
    return [down for down in powers if m // down >= 16 and n * down // warps >= 8] or [1]


def instructions(arch: int, tile: Tile) -> float:
    """Instructions that a warp issues in a step: from machine code, else from what the step must contain."""
    kind, m, n, k, warps = tile[:5]
    if (arch, kind, m, n, warps) in INSTRUCTIONS:
        return INSTRUCTIONS[arch, kind, m, n, warps] * k / 64
    copies = (m + n) * k * 2 / (512 * warps)
    if warpgroups(arch, m, warps):
        matrix, loads = m / (16 * warps) * math.ceil(n / 256) * k / 16, 0.0
    else:
        matrix, loads = m * n * k / (2048 * warps), operand_bytes(arch, m, n, k, warps) / (512 * warps)
    return constants.UNLISTED_INSTRUCTIONS * (matrix + loads + copies)


def step_cycles(gpu: Gpu, tile: Tile) -> dict[str, float]:
    """Clocks that each unit of an SM needs for one step of a product."""
    _, m, n, k, warps = tile[:5]
    fetched = (m + n) * k * 2
    read = operand_bytes(gpu.arch, *((n, m) if tile.swap else (m, n)), k, warps)
    return {
        "tensor": 2 * m * n * k / tensor_rate(gpu),
        "issue": instructions(gpu.arch, tile) * warps / SCHEDULERS,
        "shared": (read + fetched) / SHARED_BYTES_PER_CLOCK,
        "L2": fetched / gpu.l2_read,
    }


def attention_cycles(gpu: Gpu, m: int, n: int, channels: int, warps: int, page_bytes: int) -> dict[str, float]:
    """Clocks for one step of attention: scores of m rows with n keys, and their products with n values."""
    elements = 2 * n * channels
    if warpgroups(gpu.arch, m, warps):
        read = (m * channels + elements) * 2
    else:
        # Each 16 rows read all keys and values, each warp its queries; weights change hands on the way.
        read = (min(warps, m // 16) * elements + warps * 16 * channels + 3 * m * n) * 2
    if page_bytes == 1:
        read += elements * constants.WIDENED_BYTES[gpu.arch]
    key = (gpu.arch, "attention" if page_bytes > 1 else "attention int8", m, n, warps)
    copies = elements * page_bytes / (512 * warps)
    matrix = 2 * m * n * channels / (2048 * warps)
    issued = INSTRUCTIONS.get(key, constants.UNLISTED_INSTRUCTIONS * (matrix + read / (512 * warps) + copies))
    return {
        "tensor": 4 * m * n * channels / tensor_rate(gpu),
        "issue": issued * (channels / 128 if key in INSTRUCTIONS else 1) * warps / SCHEDULERS,
        "shared": (read + elements * page_bytes) / SHARED_BYTES_PER_CLOCK,
        "L2": elements * page_bytes / gpu.l2_read,
    }


def tensor_rate(gpu: Gpu) -> float:
    """FLOP per clock of an SM: what it does at best, and not more than the fastest GEMM known."""
    return min(gpu.flop_per_clock, gpu.best_gemm / (gpu.sms * gpu.clock))


def makespan(costs: Iterable[float], workers: int) -> float:
    """When the last of `workers` is done that take jobs in order, each as soon as it is free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def waves(gpu: Gpu, tiles: int, occupancy: int) -> tuple[int, int]:
    """How many times the GPU fills up with programs, and how many share an SM meanwhile."""
    together = max(1, min(occupancy, math.ceil(tiles / gpu.sms)))
    return math.ceil(tiles / (gpu.sms * together)), together


def memory_seconds(gpu: Gpu, nbytes: float, in_flight: float | None = None) -> float:
    """Time of `nbytes` through HBM, with `in_flight` of them on their way at once (Little's law)."""
    rate = HBM_SHARE * gpu.bandwidth
    if in_flight:
        rate = min(rate, in_flight / constants.MEMORY_LATENCY[gpu.arch])
    return gpu.fill / gpu.clock + nbytes / rate


def product(
    gpu: Gpu, name: str, tile: Tile, tiles: int, inner: int, *, flops: float, nbytes: float, stored: float,
    loaded: float = 0, traffic: float | None = None, note: str = "",
) -> Kernel:  # fmt: skip
    """A kernel of `tiles` equal tiles over `inner` elements; `stored` and `loaded` are bytes of a tile's epilogue.

    `nbytes` is what must cross HBM, `traffic` what does where that is more.
    """
    whole = whole_tiles(tiles, gpu.sms * tile.occupancy) if tile.halves else tiles
    count, together = waves(gpu, whole, tile.occupancy)
    step, epilogue = step_cycles(gpu, tile), stored / gpu.l2_write + loaded / gpu.l2_read
    slowest = max(step, key=step.__getitem__)
    steps = math.ceil(inner / tile.k)
    clocks = count * (steps * step[slowest] * together + gpu.fill + epilogue)
    rounds = f"{count} waves ({whole / max(1, count * gpu.sms * together):.0%} full)"
    if whole < tiles:
        half = step_cycles(gpu, tile._replace(n=tile.n // 2))
        clocks += steps * max(half.values()) + gpu.fill + epilogue / 2
        rounds = f"{count} waves and one of {2 * (tiles - whole)} halves"
    compute = clocks / gpu.clock
    resident = min(tiles, gpu.sms * tile.occupancy)
    in_flight = resident * max(1, tile.stages - 2) * (tile.m + tile.n) * tile.k * 2
    memory = memory_seconds(gpu, traffic or nbytes, in_flight)
    return Kernel(
        name, LAUNCH + max(compute, memory), flops, nbytes, slowest if compute >= memory else "HBM",
        note or f"{tile}, {tiles} tiles, {rounds}",
    )  # fmt: skip


def stream(gpu: Gpu, name: str, nbytes: float, flops: float = 0, note: str = "") -> Kernel:
    """A kernel that does nothing but read and write."""
    return Kernel(name, LAUNCH + memory_seconds(gpu, nbytes), flops, nbytes, "HBM", note)


def together(name: str, kernels: list[Kernel], note: str = "") -> Kernel:
    """Kernels one after the other, bound by what bounds most of their time."""
    seconds = sum(kernel.seconds for kernel in kernels)
    share: dict[str, float] = {}
    for kernel in kernels:
        share[kernel.bound] = share.get(kernel.bound, 0) + kernel.seconds
    bound = max(share, key=share.__getitem__)
    return Kernel(name, seconds, sum(k.flops for k in kernels), sum(k.bytes for k in kernels), bound, note)
