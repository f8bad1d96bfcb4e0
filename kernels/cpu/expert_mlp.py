"""The experts' MLPs as batched GEMMs over blocks of rows; one expert at a time where there are few tokens.

N tokens, K experts per token, D hidden width, F expert width, E experts. Every expert's slots are gathered into blocks
of C rows, M blocks in all: C is a little above the mean load, so that near balance each expert has one block and its
weights are multiplied in place, and an overloaded one takes several. Against a GEMM per expert this measured 1.6 to 2
times as fast for 2,048 tokens of 16 experts on two cores: every operation less is a meeting of threads less. Spare
rows are copies of token 0 that no slot reads back and whose gradient is zero.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.grouped_gemm import bucket, padded_layout

FEW_SLOTS = 32
"""Slots per expert below which inference runs only the experts that were chosen, each for as many rows as it needs."""
SLACK = 1.25
"""Rows in a block, as a multiple of the mean load."""


class Blocks(NamedTuple):
    """Where every slot's row goes."""

    tokens: Tensor
    """Token of every row, int64 (M * C,)."""
    row_of_slot: Tensor
    """Row of every slot, int64 (N * K,)."""
    experts: Tensor | None
    """Expert of every block, int64 (M,); None where block e is expert e's only one."""
    size: int
    """C, rows in a block."""


def unsupported(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> str | None:
    return unsupported_dtype(x)


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
    tokens, row_of_slot = place(experts, order, offsets, torch.tensor(starts[:-1]), starts[-1])
    rows = x.index_select(0, tokens)
    y = torch.empty_like(rows)
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            gate, up = torch.mm(rows[start:end], gate_up[e].t()).chunk(2, dim=1)
            torch.mm(functional.silu(gate).mul_(up), down[e].t(), out=y[start:end])
    return combine(y, weights, row_of_slot)


def expert_mlp_forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, D), and what the backward needs: pre-activations (M, C, 2F) and expert outputs (M * C, D)."""
    blocks = make_blocks(experts, order, offsets)
    rows = x.index_select(0, blocks.tokens).view(-1, blocks.size, x.shape[1])
    hidden = torch.bmm(rows, of_blocks(gate_up, blocks).mT)
    gate, up = hidden.chunk(2, dim=2)
    y = torch.bmm(functional.silu(gate).mul_(up), of_blocks(down, blocks).mT).flatten(0, 1)
    return combine(y, weights, blocks.row_of_slot), hidden, y


def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (N, D), weights (N, K) float32, gate_up (E, 2F, D) and down (E, D, F)."""
    N, K = weights.shape
    D = x.shape[1]
    blocks = make_blocks(experts, order, offsets)
    shape = (-1, blocks.size, D)
    weight_of_row = x.new_zeros(len(blocks.tokens), 1)
    weight_of_row[blocks.row_of_slot] = weights.view(-1, 1).to(x.dtype)
    rows = x.index_select(0, blocks.tokens).view(shape)
    grad_y = grad.index_select(0, blocks.tokens).mul_(weight_of_row).view(shape)
    gate, up = hidden.chunk(2, dim=2)
    grad_act = torch.bmm(grad_y, of_blocks(down, blocks))
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=2)
    act = functional.silu(gate)
    torch.mul(grad_act, act, out=grad_up)
    act.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
    grad_down = of_experts(torch.bmm(grad_y.mT, act), blocks, len(down))
    grad_gate_up = of_experts(torch.bmm(grad_hidden.mT, rows), blocks, len(down))
    grad_rows = torch.bmm(grad_hidden, of_blocks(gate_up, blocks)).flatten(0, 1)
    first, *others = blocks.row_of_slot.view(N, K).unbind(1)
    grad_x = grad_rows.index_select(0, first)
    for chosen in others:
        grad_x.add_(grad_rows.index_select(0, chosen))
    grad_weights = (y.index_select(0, blocks.row_of_slot).view(N, K, D) * grad[:, None]).sum(2, dtype=torch.float32)
    return grad_x, grad_weights, grad_gate_up, grad_down


def make_blocks(experts: Tensor, order: Tensor, offsets: Tensor) -> Blocks:
    counts = offsets.diff()
    size = bucket(int(len(order) / len(counts) * SLACK) + 1)
    # An idle expert keeps a block of spare rows, so that block e is expert e's as long as none has two.
    number = counts.add(size - 1).div_(size, rounding_mode="floor").clamp_(min=1)
    ends = number.cumsum(0)
    total = int(ends[-1])
    tokens, row_of_slot = place(experts, order, offsets, (ends - number) * size, total * size)
    chosen = None if total == len(counts) else torch.repeat_interleave(number)
    return Blocks(tokens, row_of_slot, chosen, size)


def of_blocks(weight: Tensor, blocks: Blocks) -> Tensor:
    """Weights (E, ...) as those of every block, (M, ...)."""
    return weight if blocks.experts is None else weight.index_select(0, blocks.experts)


def of_experts(grad: Tensor, blocks: Blocks, num_experts: int) -> Tensor:
    """Gradients of every block's weights (M, ...) summed over each expert's blocks, (E, ...)."""
    if blocks.experts is None:
        return grad
    total = torch.zeros(num_experts, *grad.shape[1:]).index_add_(0, blocks.experts, grad.float())
    return total.to(grad.dtype)


def place(experts: Tensor, order: Tensor, offsets: Tensor, starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The token of every row (total,) and the row of every slot (N * K,), int64, where expert e's rows begin at
    starts[e], int64 (E,)."""
    slots = torch.arange(len(order))
    shift = starts - offsets[:-1]
    row_of_slot = torch.empty_like(order).index_copy_(0, order, slots).add_(shift[experts.view(-1)])
    tokens = torch.zeros(total, dtype=torch.int64).index_copy_(0, row_of_slot, slots // experts.shape[1])
    return tokens, row_of_slot


def combine(y: Tensor, weights: Tensor, row_of_slot: Tensor) -> Tensor:
    """Sum over each token's choices of weight times row: (R, D), (N, K), (N * K,) -> (N, D)."""
    rows = row_of_slot.view(weights.shape)
    weights = weights.to(y.dtype)
    out = y.index_select(0, rows[:, 0]).mul_(weights[:, :1])
    for k in range(1, weights.shape[1]):
        out.addcmul_(y.index_select(0, rows[:, k]), weights[:, k : k + 1])
    return out
