"""The experts' MLPs, forward and backward: gather, product, SwiGLU, product, weighted sum.

The first product gathers its rows as it loads them and takes half its columns from the gate rows and half from the up
rows of the weights, so that SwiGLU is done in registers: interleaving the two in shared memory, which TMA does for
nothing with a three-dimensional box, measured the same instructions as weights interleaved in memory and leaves these
in Hugging Face's order. The backward keeps the pre-activations alone: activations, gathered rows and the gradient of
the router's weights (the product of an expert's output gradient with its output, taken before the down projection, as
in SonicMoE, Guo et al. 2025) are made again. Sums over a token's experts are taken in order by one program.

N tokens, K experts per token, S = N * K slots, D hidden width, F expert width, E experts.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.gpu import unsupported_dtype
from kernels.gpu.grouped import (
    find_tile,
    grid,
    halves_left,
    matrix,
    meta,
    multiply_rows,
    product,
    tile_schedule,
    whole_tiles,
)  # fmt: skip
from kernels.gpu.launch import aligned, descriptor, launch, target
from kernels.gpu.permute import combine, gather
from kernels.gpu.weight_gradient import weight_gradient

EPILOGUE_COLUMNS = tl.constexpr(32)


def unsupported(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> str | None:
    if not x.dtype == gate_up.dtype == down.dtype:
        return f"wants tokens and weights of one dtype, not {x.dtype}, {gate_up.dtype} and {down.dtype}"
    return unsupported_dtype(x)


def expert_mlp(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Output (N, D)."""
    return forward(x, weights, order, offsets, gate_up, down, save=False)[0]


def expert_mlp_forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (N, D), and what the backward needs: pre-activations (S, 2F) in sorted order."""
    return forward(x, weights, order, offsets, gate_up, down, save=True)


def forward(
    x: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """Output (N, D) and, if `save`, the pre-activations (S, 2F), else an empty tensor."""
    x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
    (S, N), E = (order.shape[0], x.shape[0]), gate_up.shape[0]
    gpu = target(x.device)
    # A few tokens stream their experts' weights, and split the inner dimension of the second product if those are few.
    decode = N <= tiles.DECODE_TOKENS and not save
    tile = tiles.decode_gemm(gpu.arch, N, x.itemsize) if decode else tiles.expert_gemm(gpu.arch, S, E, x.itemsize)
    splits = tiles.decode_splits(*down.shape[1:], S // max(N, 1), tile, gpu.sms) if decode else 1
    schedule = tile_schedule(offsets, S, tile.block_m)
    act, hidden = up_and_swiglu(x, order, offsets, schedule, gate_up, tile, save)
    y = multiply_rows(act, down, offsets, schedule, tile, transposed=True, order=order, splits=splits)
    return combine(y, weights, x), hidden


def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (N, D), weights (N, K) float32, gate_up (E, 2F, D) and down (E, D, F)."""
    x, gate_up, down, weights = x.contiguous(), gate_up.contiguous(), down.contiguous(), weights.contiguous()
    K = weights.shape[1]
    tile = tiles.expert_gemm(target(x.device).arch, order.shape[0], gate_up.shape[0], x.itemsize)
    schedule = tile_schedule(offsets, order.shape[0], tile.block_m)
    grad_rows = gather(grad, order, K)
    grad_hidden, act, grad_weights = swiglu_backward(
        grad_rows, down, hidden, weights, order, offsets, schedule, tile
    )  # fmt: skip
    grad_down = weight_gradient(grad_rows, act, offsets)
    grad_gate_up = weight_gradient(grad_hidden, gather(x, order, K), offsets)
    grad_slots = multiply_rows(grad_hidden, gate_up, offsets, schedule, tile, transposed=False, order=order)
    return combine(grad_slots, None, x), grad_weights.view_as(weights), grad_gate_up, grad_down


def up_and_swiglu(
    x: Tensor, order: Tensor, offsets: Tensor, schedule: Tensor, gate_up: Tensor, tile: tiles.GemmTile, save: bool
) -> tuple[Tensor, Tensor]:
    """Activations (S, F) and pre-activations (S, 2F), gate before up, of the sorted slots."""
    S, (N, D) = order.shape[0], x.shape
    E, F = gate_up.shape[0], gate_up.shape[1] // 2
    act, hidden = x.new_empty(S, F), x.new_empty(S, 2 * F) if save else x.new_empty(0)
    gpu = target(x.device)
    tma = gpu.has_tma and aligned(gate_up)
    whole, half = ([tile.block_n // parts, tile.block_k] for parts in (2, 4))
    launch(
        up_kernel, grid(gpu.sms, tile, S, E, 2 * F), x, matrix(gate_up, whole, parts=2) if tma else gate_up,
        matrix(gate_up, half, parts=2) if tma else gate_up, act, hidden, order, schedule, offsets, F, D,
        CHOICES=S // max(N, 1), SAVE=save, B_TMA=tma, EVEN=D % tile.block_k == 0, SWAP=tile.swap, HALVES=tile.halves,
        **meta(tile),
    )  # fmt: skip
    return act, hidden


@triton.jit
def up_kernel(
    x, gate_up, gate_up_half, act, hidden, order, schedule, offsets, F, D,
    CHOICES: tl.constexpr, SAVE: tl.constexpr, B_TMA: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, BLOCK_N // 2)
    whole = whole_tiles(tl.load(schedule) * columns, HALVES)
    for tile in range(tl.program_id(0), whole, tl.num_programs(0)):
        expert, row, end, column = find_tile(tile, schedule, offsets, columns, BLOCK_M, GROUP)
        up_tile(
            x, gate_up, act, hidden, order, expert, row, end, column, F, D,
            CHOICES, SAVE, B_TMA, EVEN, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HALVES:
        half = tl.program_id(0)
        if half < halves_left(schedule, columns, whole):
            expert, row, end, column = find_tile(whole + half // 2, schedule, offsets, columns, BLOCK_M, GROUP)
            up_tile(
                x, gate_up_half, act, hidden, order, expert, row, end, 2 * column + half % 2, F, D,
                CHOICES, SAVE, B_TMA, EVEN, SWAP, BLOCK_M, BLOCK_N // 2, BLOCK_K,
            )  # fmt: skip


@triton.jit
def up_tile(
    x, gate_up, act, hidden, order, expert, row, end, column, F, D,
    CHOICES: tl.constexpr, SAVE: tl.constexpr, B_TMA: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // 2
    rows = row + tl.arange(0, BLOCK_M)
    token = tl.load(order + tl.minimum(rows, end - 1)) // CHOICES
    y = product(
        x, token, row, gate_up, expert, column, F, D,
        0, D, False, B_TMA, False, 2, EVEN, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    n = column * WIDTH + tl.arange(0, WIDTH)
    inside = (rows < end)[:, None] & (n < F)[None, :]
    gate, up = y.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    value = gate * tl.sigmoid(gate) * up
    tl.store(act + rows.to(tl.int64)[:, None] * F + n[None, :], value.to(act.dtype.element_ty), mask=inside)
    if SAVE:
        pointers = hidden + rows.to(tl.int64)[:, None] * (2 * F) + n[None, :]
        tl.store(pointers, gate.to(hidden.dtype.element_ty), mask=inside)
        tl.store(pointers + F, up.to(hidden.dtype.element_ty), mask=inside)


def swiglu_backward(
    grad_rows: Tensor, down: Tensor, hidden: Tensor, weights: Tensor, order: Tensor, offsets: Tensor,
    schedule: Tensor, tile: tiles.GemmTile,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the output's gradient at every sorted slot (S, D): the gradient of the pre-activations (S, 2F), the
    activations times router weight (S, F), and the gradient of the router weights, float32 (S,) in slot order."""
    (S, D), (E, _, F) = grad_rows.shape, down.shape
    grad_hidden, act = hidden.new_empty(S, 2 * F), hidden.new_empty(S, F)
    dots = weights.new_empty(2 * triton.cdiv(F, tile.block_n), S)
    gpu = target(grad_rows.device)
    tma = gpu.has_tma and aligned(grad_rows, down)
    launch(
        swiglu_backward_kernel, grid(gpu.sms, tile, S, E, F),
        descriptor(grad_rows, [tile.block_m, tile.block_k]) if tma else grad_rows,
        matrix(down, [tile.block_k, tile.block_n]) if tma else down,
        matrix(down, [tile.block_k, tile.block_n // 2]) if tma else down,
        hidden, weights, grad_hidden, act, dots, order, schedule, offsets, S, F, D,
        TMA=tma, EVEN=D % tile.block_k == 0 and F % tile.block_n == 0, HALVES=tile.halves, **meta(tile),
    )  # fmt: skip
    return grad_hidden, act, dots.sum(0)


@triton.jit
def swiglu_backward_kernel(
    grad_rows, down, down_half, hidden, weights, grad_hidden, act, dots, order, schedule, offsets, S, F, D,
    TMA: tl.constexpr, EVEN: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dots (2 * columns, S): of every half tile's columns, so that a tile in halves leaves what a whole one does."""
    columns = tl.cdiv(F, BLOCK_N)
    whole = whole_tiles(tl.load(schedule) * columns, HALVES)
    for tile in range(tl.program_id(0), whole, tl.num_programs(0)):
        expert, row, end, column = find_tile(tile, schedule, offsets, columns, BLOCK_M, GROUP)
        rows = row + tl.arange(0, BLOCK_M)
        y = product(
            grad_rows, tl.minimum(rows, end - 1), row, down, expert, column, F, D,
            0, D, TMA, TMA, True, 1, EVEN, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        left, right = halves(y)
        swiglu_tile(left, 2 * column, rows, end, hidden, weights, grad_hidden, act, dots, order, S, F)
        swiglu_tile(right, 2 * column + 1, rows, end, hidden, weights, grad_hidden, act, dots, order, S, F)
    if HALVES:
        half = tl.program_id(0)
        if half < halves_left(schedule, columns, whole):
            expert, row, end, column = find_tile(whole + half // 2, schedule, offsets, columns, BLOCK_M, GROUP)
            rows = row + tl.arange(0, BLOCK_M)
            column = 2 * column + half % 2
            y = product(
                grad_rows, tl.minimum(rows, end - 1), row, down_half, expert, column, F, D,
                0, D, TMA, TMA, True, 1, EVEN, False, BLOCK_M, BLOCK_N // 2, BLOCK_K,
            )  # fmt: skip
            swiglu_tile(y, column, rows, end, hidden, weights, grad_hidden, act, dots, order, S, F)


@triton.jit
def swiglu_tile(y, column, rows, end, hidden, weights, grad_hidden, act, dots, order, S, F):
    slot = tl.load(order + tl.minimum(rows, end - 1))
    weight = tl.load(weights + slot)[:, None]
    dot = swiglu_gradients(y, column * y.shape[1], weight, rows, end, hidden, grad_hidden, act, F)
    tl.store(dots + column.to(tl.int64) * S + slot, dot, mask=rows < end)


@triton.jit
def halves(y):
    """The left and the right columns of a tile."""
    return y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def swiglu_gradients(y, first, weight, rows, end, hidden, grad_hidden, act, F):
    """A few columns at a time: a whole tile with its gate and up spilled 1,700 registers on sm_90."""
    if y.shape[1] <= EPILOGUE_COLUMNS:
        dot = swiglu_gradient(y, first, weight, rows, end, hidden, grad_hidden, act, F)
    else:
        left, right = halves(y)
        dot = swiglu_gradients(left, first, weight, rows, end, hidden, grad_hidden, act, F)
        dot += swiglu_gradients(right, first + y.shape[1] // 2, weight, rows, end, hidden, grad_hidden, act, F)
    return dot


@triton.jit
def swiglu_gradient(y, first, weight, rows, end, hidden, grad_hidden, act, F):
    """Store what follows from the activations' gradient y (M, n), before the router weight; the dot products with the
    activations, (M,)."""
    n = first + tl.arange(0, y.shape[1])
    inside = (rows < end)[:, None] & (n < F)[None, :]
    line = rows.to(tl.int64)[:, None]
    pointers = hidden + line * (2 * F) + n[None, :]
    gate = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointers + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # Columns past F are left out, not multiplied by their activation of 0, which would let a NaN through.
    dot = tl.sum(tl.where(inside, y * silu * up, 0.0), 1)
    tl.store(act + line * F + n[None, :], (silu * up * weight).to(act.dtype.element_ty), mask=inside)
    y = y * weight
    pointers = grad_hidden + line * (2 * F) + n[None, :]
    tl.store(pointers, (y * up * (sigmoid + silu * (1 - sigmoid))).to(act.dtype.element_ty), mask=inside)
    tl.store(pointers + F, (y * silu).to(act.dtype.element_ty), mask=inside)
    return dot
