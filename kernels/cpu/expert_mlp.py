"""The experts' MLPs, one expert at a time so that everything between its GEMMs stays in the cache.

N tokens, K experts per token, D hidden width, F expert width, E experts, R rows with padding: every expert's rows are
gathered into a region whose size is one of few (see grouped_gemm.py), its spare rows copies of token 0 that no slot
reads back and whose gradient is zero.
"""

import itertools

import torch
import torch.nn.functional as functional
from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.grouped_gemm import padded_layout


def unsupported(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> str | None:
    return unsupported_dtype(x)


def expert_mlp(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return expert_mlp_forward(x, weights, experts, order, offsets, gate_up, down, keep=False)[0]


def expert_mlp_forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (N, D), and with `keep` what the backward needs: pre-activations (R, 2F) and expert outputs (R, D)."""
    tokens, row_of_slot, starts = place_slots(experts, order, offsets)
    rows = x.index_select(0, tokens)
    hidden = x.new_empty(len(rows), gate_up.shape[1]) if keep else x.new_empty(0, gate_up.shape[1])
    y = x.new_empty(len(rows), x.shape[1])
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            h = torch.mm(rows[start:end], gate_up[e].t(), out=hidden[start:end] if keep else None)
            gate, up = h.chunk(2, dim=1)
            torch.mm(functional.silu(gate).mul_(up), down[e].t(), out=y[start:end])
    return combine(y, weights, row_of_slot), hidden, y


def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (N, D), weights (N, K) float32, gate_up (E, 2F, D) and down (E, D, F).

    Router weights scale rows of width D only: the chain through SwiGLU runs unscaled, and its two ends are scaled.
    """
    N, K = weights.shape
    D, F = x.shape[1], down.shape[2]
    tokens, row_of_slot, starts = place_slots(experts, order, offsets)
    weight_of_row = x.new_zeros(len(tokens), 1)
    weight_of_row[row_of_slot] = weights.view(-1, 1).to(x.dtype)
    rows, grad_y = x.index_select(0, tokens), grad.index_select(0, tokens)
    scaled_rows, scaled_grad_y = rows.mul_(weight_of_row), grad_y * weight_of_row
    grad_rows = torch.empty_like(rows)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end:
            grad_gate_up[e].zero_()
            grad_down[e].zero_()
            continue
        gate, up = hidden[start:end].chunk(2, dim=1)
        grad_act = grad_y[start:end] @ down[e]
        grad_hidden = x.new_empty(end - start, 2 * F)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=1)
        act = functional.silu(gate)
        torch.mul(grad_act, act, out=grad_up)
        act.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_gate)
        torch.mm(scaled_grad_y[start:end].t(), act, out=grad_down[e])
        torch.mm(grad_hidden.t(), scaled_rows[start:end], out=grad_gate_up[e])
        torch.mm(grad_hidden, gate_up[e], out=grad_rows[start:end])
    grad_x = combine(grad_rows, weights, row_of_slot)
    grad_weights = (y.index_select(0, row_of_slot).view(N, K, D) * grad[:, None]).sum(2, dtype=torch.float32)
    return grad_x, grad_weights, grad_gate_up, grad_down


def place_slots(experts: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Where every slot's row goes.

    Returns the token of every padded row (R,) int64, the row of every slot (N * K,) int64, and the start of each
    expert's region with their total R as last entry.
    """
    bounds = offsets.tolist()
    starts, _ = padded_layout([end - start for start, end in itertools.pairwise(bounds)])
    shift = torch.tensor([start - bound for start, bound in zip(starts, bounds, strict=True)])
    slots = torch.arange(len(order))
    row_of_slot = torch.empty_like(order).index_copy_(0, order, slots).add_(shift[experts.view(-1)])
    tokens = torch.zeros(starts[-1], dtype=torch.int64).index_copy_(0, row_of_slot, slots // experts.shape[1])
    return tokens, row_of_slot, starts


def combine(y: Tensor, weights: Tensor, row_of_slot: Tensor) -> Tensor:
    """Sum over each token's choices of weight times row: (R, D), (N, K), (N * K,) -> (N, D)."""
    rows = row_of_slot.view(weights.shape)
    weights = weights.to(y.dtype)
    out = y.index_select(0, rows[:, 0]).mul_(weights[:, :1])
    for k in range(1, weights.shape[1]):
        out.addcmul_(y.index_select(0, rows[:, k]), weights[:, k : k + 1])
    return out
