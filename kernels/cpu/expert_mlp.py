"""The experts' MLPs: native_experts where that suits, else one batched GEMM, and one for each expert that overflows it.

N tokens, K experts per token, D hidden width, F expert width, E experts. Each expert has C rows of a batched product,
whose GEMMs run side by side, a thread each; the slots beyond C of an expert have rows of their own behind those, in a
GEMM that all threads share. That one costs more for a row, and the rows that an expert leaves empty cost what others
do, so C is what makes the sum of both least. Against a GEMM for every expert this measured 1.2 to 2 times as fast
(2,048 tokens of 16 experts, 2 cores): every operation less is a meeting of threads less.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu import native_experts, unsupported_dtype
from kernels.cpu.grouped_gemm import bucket, padded_layout
from kernels.cpu.passes import passes

FEW_SLOTS = 32
"""Slots per expert below which inference runs only the experts that were chosen, each for as many rows as it needs."""
STEP = 32
"""Row counts of the products are multiples of this: oneDNN compiles a kernel for each that it meets."""
OVERFLOW_ROWS = 48
"""What a GEMM of its own costs, in rows of the batched one."""
OVERFLOW_RATE = 1.5
"""What a row of it costs, in the same."""


class Layout(NamedTuple):
    """Where every slot's row goes."""

    tokens: Tensor
    """Token of every row, int64 (M,); -1 for a spare row."""
    slots: Tensor
    """Slot of every row, int64 (M,); -1 for a spare row."""
    row_of_slot: Tensor
    """Row of every slot, int64 (N, K)."""
    size: int
    """C, rows of an expert in the batched product."""
    overflow: list[tuple[int, slice]]
    """The experts with more slots, and their further rows."""


def unsupported(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> str | None:
    if gate_up.dtype == down.dtype == x.dtype or rounds(x, gate_up, down):
        return unsupported_dtype(x)
    return f"wants tokens and weights of one dtype here, not {x.dtype}, {gate_up.dtype} and {down.dtype}"


def rounds(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether weights of float32 need no copy in x's dtype, nor their gradients one in it."""
    wide = gate_up.dtype == down.dtype == torch.float32
    return wide and not torch.compiler.is_compiling() and native_experts.suits(x, gate_up)


def expert_mlp(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Output (N, D)."""
    args = (x, weights, experts, order, offsets, gate_up, down)
    return one_by_one(*args) if len(order) < FEW_SLOTS * len(gate_up) else expert_mlp_forward(*args)[0]


def one_by_one(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Output (N, D), from a GEMM for each chosen expert: what no token chose is not read from memory."""
    starts, _ = padded_layout(offsets.diff().tolist())
    tokens, _, row_of_slot = passes().place(order, offsets, starts[:-1], experts.shape, 0, starts[-1])
    rows = passes().gather(x, tokens)
    y = torch.empty_like(rows)
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            act = passes().swiglu(torch.mm(rows[start:end], gate_up[e].to(x.dtype).t()))
            torch.mm(act, down[e].to(x.dtype).t(), out=y[start:end])
    return passes().combine(y, weights, row_of_slot)


def expert_mlp_forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (N, D), and the pre-activations (M, 2F) that the backward needs."""
    if native_experts.suits(x, gate_up):
        return native_experts.forward(x, weights, experts, order, offsets, gate_up, down)
    layout = make_layout(order, offsets, experts.shape)
    hidden = products(passes().gather(x, layout.tokens), gate_up.mT, layout)
    y = products(passes().swiglu(hidden), down.mT, layout)
    return passes().combine(y, weights, layout.row_of_slot), hidden


def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (N, D), weights (N, K) float32, gate_up (E, 2F, D) and down (E, D, F).

    A row's output is not needed: its product with the gradient is that of `act` with the gradient through `down`.
    """
    if native_experts.suits(x, gate_up):
        return native_experts.backward(grad, x, weights, experts, order, offsets, gate_up, down, hidden)
    layout = make_layout(order, offsets, experts.shape)
    grad_rows = passes().gather(grad, layout.tokens)
    act = products(grad_rows, down, layout)  # its gradient, unweighted, which becomes weight * act
    grad_hidden, grad_weights = passes().swiglu_backward(act, hidden, weights.contiguous(), layout.slots)
    grad_down = weight_products(grad_rows, act, layout, len(down))
    rows = passes().gather(x, layout.tokens)
    grad_gate_up = weight_products(grad_hidden, rows, layout, len(down))
    grad_x = passes().combine(products(grad_hidden, gate_up, layout), None, layout.row_of_slot)
    return grad_x, grad_weights, grad_gate_up, grad_down


def make_layout(order: Tensor, offsets: Tensor, shape: torch.Size) -> Layout:
    loads = offsets.diff().tolist()
    E, size = len(loads), batch_rows(loads)
    end, starts, overflow = E * size, [], []
    for e, load in enumerate(loads):
        starts.append(end - size)
        if load > size:
            rows = bucket(load - size)
            overflow.append((e, slice(end, end + rows)))
            end += rows
    return Layout(*passes().place(order, offsets, starts, shape, size, end), size, overflow)


def batch_rows(loads: list[int]) -> int:
    """C for experts of these loads: a multiple of STEP."""
    sizes = range(STEP, max(max(loads), 1) + STEP, STEP)
    return min(sizes, key=lambda size: (cost(loads, size), size))


def cost(loads: list[int], size: int) -> float:
    over = [load - size for load in loads if load > size]
    return len(loads) * size + sum(OVERFLOW_ROWS + OVERFLOW_RATE * bucket(rows) for rows in over)


def products(rows: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Rows (M, I) by their experts' weights (E, I, O), to (M, O)."""
    E, inner, outer = weight.shape
    end = E * layout.size
    out = rows.new_empty(len(rows), outer)
    torch.bmm(rows[:end].view(E, -1, inner), weight, out=out[:end].view(E, -1, outer))
    for e, further in layout.overflow:
        torch.mm(rows[further], weight[e], out=out[further])
    return out


def weight_products(grads: Tensor, rows: Tensor, layout: Layout, num_experts: int) -> Tensor:
    """Gradients of the experts' weights, (E, O, I), from those of the outputs (M, O) and the inputs (M, I)."""
    end = num_experts * layout.size
    out = torch.bmm(grads[:end].view(num_experts, layout.size, -1).mT, rows[:end].view(num_experts, layout.size, -1))
    for e, further in layout.overflow:
        out[e].addmm_(grads[further].t(), rows[further])
    return out
