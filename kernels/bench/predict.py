"""What the Triton kernels would cost on a GPU, launch by launch, from the tiles that kernels.tiles really chooses.

Loads of experts are drawn, not averaged, so row tiles that are partly empty and waves that are partly full count. Where
the launchers of kernels.gpu start a kernel, a function here adds one.

N tokens, S slots (N times experts per token), D hidden width, F expert width, E experts; B sequences, H query heads,
G key-value heads, C channels of a head.
"""

import math
from collections.abc import Callable

from kernels import attention_tiles, tiles
from kernels.bench import model
from kernels.bench.constants import CALIBRATION, GPUS, LAUNCH, VALIDATION, Gpu, Published
from kernels.bench.cost import cost
from kernels.bench.distributions import loads
from kernels.bench.model import Kernel, Tile, attention_cycles, memory_seconds, product, step_cycles, stream, together
from kernels.bench.shapes import SHAPES, Shape

BYTES = 2
"""Of an element: the model is for bfloat16 and float16."""


def gemm_tile(kind: str, tile: tiles.GemmTile) -> Tile:
    return Tile(
        kind, tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, tile.occupancy, tile.swap,
        tile.halves,
    )  # fmt: skip


def row_tiles(rows: tuple[int, ...], block: int) -> int:
    return sum(math.ceil(n / block) for n in rows)


def grouped(
    gpu: Gpu, name: str, tile: Tile, rows: tuple[int, ...], columns: int, inner: int, *,
    stored: float = 1, loaded: float = 0, splits: int = 1,
) -> Kernel:  # fmt: skip
    """Rows of every expert times its matrix (columns, inner).

    `stored` and `loaded` are elements that the epilogue writes and reads per element of the product.
    """
    S, element = sum(rows), tile.m * tile.n * BYTES
    stored *= 1 if splits == 1 else 2  # spans come apart in float32
    tiles_m = row_tiles(rows, tile.m)
    across = math.ceil(columns / tile.n)
    matrix = columns * inner * BYTES
    # A matrix that L2 cannot keep comes from HBM again for every group of row tiles that sweeps it.
    again = matrix > gpu.l2_bytes / 2
    sweeps = sum(math.ceil(n / tile.m / tiles.GROUP) if again else 1 for n in rows if n)
    rest = S * inner * BYTES + S * columns * BYTES * (stored * splits + loaded)
    filled = S / (tiles_m * tile.m) if tiles_m else 1
    kernel = product(
        gpu, name, tile, tiles_m * across * splits, math.ceil(inner / splits), flops=2.0 * S * columns * inner,
        nbytes=sum(matrix for n in rows if n) + rest, traffic=sweeps * matrix + rest, stored=stored * element,
        loaded=loaded * element,
    )  # fmt: skip
    return kernel._replace(note=f"{kernel.note}, rows {filled:.0%} full" + (f", {splits} spans" if splits > 1 else ""))


def gradient(gpu: Gpu, name: str, rows: tuple[int, ...], A: int, B: int) -> list[Kernel]:
    """Gradient (E, A, B) of the experts' matrices: programs in order of expert, each as long as its expert's rows."""
    chosen = tiles.weight_gradient(gpu.arch, BYTES)
    tile = gemm_tile("wgrad", chosen)
    per_item = math.ceil(A / tile.m) * math.ceil(B / tile.n)
    S = sum(rows)
    chunk = tiles.gradient_chunk(S, per_item, gpu.sms, tile.k)
    items = [min(chunk, n - start) for n in rows for start in range(0, n, chunk)]
    partials = sum(math.ceil(n / chunk) for n in rows if n > chunk) * A * B * 4
    step = step_cycles(gpu, tile)
    slowest = max(step, key=step.__getitem__)
    fixed = gpu.fill + tile.m * tile.n * (4 if partials else BYTES) / gpu.l2_write
    costs = [math.ceil(n / tile.k) * step[slowest] + fixed for n in items for _ in range(per_item)]
    compute = model.makespan(costs, gpu.sms * tile.occupancy) / gpu.clock
    nbytes = S * (A + B) * BYTES + len(rows) * A * B * BYTES
    memory = memory_seconds(gpu, nbytes + partials)
    busy = sum(costs) / gpu.clock / gpu.sms / compute
    main = Kernel(
        name, LAUNCH + max(compute, memory), 2.0 * S * A * B, nbytes, slowest if compute >= memory else "HBM",
        f"{tile}, {len(costs)} tiles, {busy:.0%} busy" + (f", chunks of {chunk} rows" if chunk < max(rows) else ""),
    )  # fmt: skip
    return [main, stream(gpu, f"{name}, partials", 1.5 * partials)]


def index_kernel(gpu: Gpu, name: str) -> Kernel:
    """A launch over a few kilobytes: its own latency, and that of its loads one after the other."""
    return stream(gpu, name, 0)


def expert_forward(gpu: Gpu, shape: Shape, *, training: bool = False) -> list[Kernel]:
    """Launches of expert_mlp in order: schedule, up with SwiGLU, down, combine."""
    N, D, F, S = shape.tokens, shape.hidden, shape.intermediate, shape.slots
    rows = loads(shape.distribution, N, shape.experts, shape.top_k, shape.seed)
    decode = N <= tiles.DECODE_TOKENS and not training
    if decode:
        chosen, kind = tiles.decode_gemm(gpu.arch, N, BYTES), "decode"
        splits = tiles.decode_splits(D, F, shape.top_k, chosen, gpu.sms)
    else:
        chosen, kind, splits = tiles.expert_gemm(gpu.arch, S, shape.experts, BYTES), "gemm", 1
    tile = gemm_tile(kind, chosen)
    return [
        index_kernel(gpu, "schedule"),
        # Half of the product's columns are the gate's: one activation for two of them.
        grouped(gpu, "up and SwiGLU", tile, rows, 2 * F, D, stored=1.5 if training else 0.5),
        grouped(gpu, "down", tile, rows, D, F, splits=splits),
        stream(gpu, "combine", S * D * (BYTES if splits == 1 else 4 * splits) + N * D * BYTES),
    ]


def expert_backward(gpu: Gpu, shape: Shape) -> list[Kernel]:
    """Launches of the gradients of expert_mlp, in order."""
    N, D, F, S = shape.tokens, shape.hidden, shape.intermediate, shape.slots
    rows = loads(shape.distribution, N, shape.experts, shape.top_k, shape.seed)
    tile = gemm_tile("gemm", tiles.expert_gemm(gpu.arch, S, shape.experts, BYTES))
    copy = stream(gpu, "gather", 2 * S * D * BYTES)
    return [
        index_kernel(gpu, "schedule"),
        copy,
        grouped(gpu, "d act and dSwiGLU", tile, rows, F, D, stored=3, loaded=2),
        *gradient(gpu, "d down", rows, D, F),
        copy,
        *gradient(gpu, "d gate_up", rows, 2 * F, D),
        grouped(gpu, "d x by slots", tile, rows, D, 2 * F),
        stream(gpu, "combine", (S + N) * D * BYTES),
    ]


def grouped_gemm(gpu: Gpu, shape: Shape) -> list[Kernel]:
    """One product of every expert's rows, hidden width to expert width."""
    rows = loads(shape.distribution, shape.tokens, shape.experts, shape.top_k, shape.seed)
    tile = gemm_tile("gemm", tiles.expert_gemm(gpu.arch, shape.slots, shape.experts, BYTES))
    product = grouped(gpu, "product", tile, rows, shape.intermediate, shape.hidden)
    return [index_kernel(gpu, "schedule"), product]


def paged_attention(gpu: Gpu, shape: Shape, page_bytes: int = BYTES) -> list[Kernel]:
    """Attention of `queries` new tokens of every sequence against its pages, then the merge of the splits."""
    B, H, G, C, T = shape.batch, shape.heads, shape.kv_heads, shape.head_dim, shape.context
    R, N = H // G, B * shape.queries
    chosen = attention_tiles.paged_tile(gpu.arch, R, C, BYTES, page_bytes)
    m, n = chosen.block_m, chosen.block_n
    blocks = B * G * math.ceil(shape.queries * R / m)
    splits = attention_tiles.split_bound(chosen, T)
    longest = min(T, chosen.split * (1 if splits <= chosen.fine else 2))
    step = attention_cycles(gpu, m, n, C, chosen.num_warps, page_bytes)
    slowest = max(step, key=step.__getitem__)
    programs = blocks * splits
    steps = max(math.ceil(longest / n), blocks * math.ceil(T / n) / gpu.sms)
    compute = (steps * step[slowest] + gpu.fill) / gpu.clock
    scales = 2 * B * G * T * 4 if page_bytes == 1 else 0
    nbytes = 2 * B * G * T * C * page_bytes + scales + 2 * N * H * C * BYTES
    partials = N * H * splits * (C * BYTES + 4) if splits > 1 else 0
    memory = memory_seconds(gpu, nbytes + partials, min(programs, gpu.sms) * 2 * n * C * page_bytes)
    main = Kernel(
        "splits", LAUNCH + max(compute, memory), 4.0 * N * H * C * T, nbytes, slowest if compute >= memory else "HBM",
        f"{m}x{n}, {splits} splits of up to {longest}, {programs} programs",
    )  # fmt: skip
    return [main, stream(gpu, "merge", partials)._replace(bytes=0)] if splits > 1 else [main]


def copies(op: str) -> Callable[[Gpu, Shape], list[Kernel]]:
    """An operation that is one pass over its operands."""
    return lambda gpu, shape: [stream(gpu, op, cost(op, shape, BYTES).bytes)]


def route(gpu: Gpu, shape: Shape) -> list[Kernel]:
    """Choices and counts, offsets, places."""
    N, S, E = shape.tokens, shape.slots, shape.experts
    choose = stream(gpu, "choose", 4 * N * E + 12 * S)
    return [choose, index_kernel(gpu, "add counts"), stream(gpu, "place", 16 * S)]


def loss_chunk(N: int, D: int, V: int) -> int:
    """Rows of a chunk; kernels.gpu.cross_entropy.chunk_rows, which cannot be asked without triton."""
    return min(N, 1 << (math.ceil(max(N, V) * D / V) - 1).bit_length())


def cross_entropy(gpu: Gpu, shape: Shape) -> list[Kernel]:
    """Loss and both gradients, all chunks together: three products of torch's, taken at the best rate known, then two
    passes over the logits and, chunk by chunk, one over the float32 gradient of the weights."""
    N, D, V = shape.tokens, shape.hidden, shape.vocab
    chunk = loss_chunk(N, D, V)
    chunks, logits = math.ceil(N / chunk), BYTES * N * V
    flops = 6.0 * N * D * V
    read = chunks * 2 * V * D * BYTES + 3 * logits
    products = max(flops / gpu.best_gemm, memory_seconds(gpu, read)) + 3 * chunks * LAUNCH
    bound = "tensor" if flops / gpu.best_gemm > memory_seconds(gpu, read) else "HBM"
    sums = chunks * V * D * (BYTES + 2 * 4)
    return [
        Kernel("products", products, flops, read, bound, f"{chunks} chunks of {chunk} rows"),
        stream(gpu, "loss and gradient of logits", 2.5 * logits)._replace(note="second reading half from L2"),
        stream(gpu, "sum of d weight", sums),
    ]


OPERATIONS: dict[str, Callable[[Gpu, Shape], list[Kernel]]] = {
    "grouped_gemm": grouped_gemm,
    "expert_mlp": expert_forward,
    "expert_mlp_backward": expert_backward,
    "expert_mlp_training": lambda gpu, shape: expert_forward(gpu, shape, training=True) + expert_backward(gpu, shape),
    "paged_attention": paged_attention,
    "paged_attention_int8": lambda gpu, shape: paged_attention(gpu, shape, 1),
    "rms_norm": copies("rms_norm"),
    "rope": copies("rope"),
    "rope_append": copies("rope_append"),
    "route": route,
    "cross_entropy": cross_entropy,
}
"""What can be predicted, by name: the launches of one call."""

BY_LOADS = ("grouped_gemm", "expert_mlp", "expert_mlp_backward", "expert_mlp_training")
"""Operations whose cost depends on how tokens choose experts."""


def predict(gpu: Gpu, op: str, shape: Shape) -> Kernel:
    """The whole call of an operation, with the FLOPs and bytes that it asks for."""
    flops, nbytes = cost(op, shape, BYTES)
    return together(op, OPERATIONS[op](gpu, shape))._replace(flops=flops, bytes=nbytes)


def published() -> list[tuple[Published, float]]:
    """What others measured, each with the model's figure in the same unit; first what it was fitted to."""
    gemm = Tile("gemm", 128, 256, 64, 8, 3, 1)
    tiles_there, flops = 65536 // gemm.m * 1024 // gemm.n, 2 * 65536 * 1024 * 1024
    fine = SHAPES["fine"]
    predicted = [
        flops / 1e12 / product(GPUS["h100"], "", gemm, tiles_there, 1024, flops=flops, nbytes=0, stored=stored).seconds
        for stored in (0, gemm.m * gemm.n * BYTES)
    ]
    liger = predict(GPUS["h100"], "expert_mlp", fine.replace(tokens=32768))
    predicted.append(liger.flops / liger.seconds / 1e12)
    for tokens in (64, 4096):
        shape = fine.replace(tokens=tokens, hidden=2816, intermediate=704)
        predicted.append(predict(GPUS["h200"], "expert_mlp", shape).seconds * 1e6)
    return list(zip(CALIBRATION + VALIDATION, predicted, strict=True))
