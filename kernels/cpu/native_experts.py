"""The experts' MLPs in one call of a C++ library (native/experts.cpp), see kernels.cpu.pairs.

N tokens, K experts per token, D hidden width, F expert width, E experts, M = N * K slots. Each expert multiplies as
many rows as it has, from gathering to SwiGLU in its core's cache. Products that share a size, side by side in one call,
need rows of padding, and a product more for each expert with many. Against those a forward and backward of nano's layer
took 0.63 of the time where loads were alike, and 0.56 with the fullest expert at 1.5 times its share (4,096 tokens, 2
cores of an EPYC of 2024).
"""

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from kernels.cpu import pairs
from kernels.cpu.passes import passes


class Shape(ctypes.Structure):
    """`Shape` of experts.cpp."""

    _fields_ = [(name, c_int64) for name in ("N", "K", "D", "F", "E", "threads", "float_weights")]


def suits(x: Tensor, gate_up: Tensor) -> bool:
    """Whether it takes tokens x (N, D) and weights gate_up (E, 2F, D), and is the fastest here."""
    known = x.dtype == torch.bfloat16 and gate_up.dtype in (torch.bfloat16, torch.float32)
    return known and x.shape[1] % pairs.WIDTH == gate_up.shape[1] % (2 * pairs.WIDTH) == 0 and pairs.fastest()


def run(name: str, x: Tensor, experts: Tensor, gate_up: Tensor, *tensors: Tensor) -> None:
    """Raises IndexError for slots that are not there."""
    E, doubled, D = gate_up.shape
    threads, float_weights = pairs.threads(experts.numel() * D), gate_up.dtype == torch.float32
    shape = Shape(*experts.shape, D, doubled // 2, E, threads, float_weights)
    if not pairs.run("experts", name, shape, *tensors):
        raise IndexError(f"order and offsets are not the {experts.numel()} slots of a routing.")


def forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (N, D), and the pre-activations (M, 2F) that the backward needs.

    gate_up and down are bfloat16, or both float32, rounded as they are read.
    """
    hidden, y = x.new_empty(len(order), gate_up.shape[1]), x.new_empty(len(order), x.shape[1])
    row_of_slot = torch.empty_like(experts, memory_format=torch.contiguous_format)
    given = [each.contiguous() for each in (x, order, offsets, gate_up, down)]
    run("forward", x, experts, gate_up, *given, hidden, y, row_of_slot)
    return passes().combine(y, weights.contiguous(), row_of_slot), hidden


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (N, D), weights (N, K) float32, gate_up (E, 2F, D) and down (E, D, F), both in theirs."""
    given = [each.contiguous() for each in (grad, x, weights, order, offsets, gate_up, down, hidden)]
    grad_hidden, acts = torch.empty_like(given[-1]), x.new_empty(len(order), down.shape[2])
    grad_rows, grad_weights = x.new_empty(len(order), x.shape[1]), torch.empty_like(given[2])
    grads = [torch.empty_like(each) for each in given[5:7]]
    row_of_slot = torch.empty_like(experts, memory_format=torch.contiguous_format)
    run("backward", x, experts, gate_up, *given, grad_hidden, acts, grad_rows, grad_weights, *grads, row_of_slot)
    return passes().combine(grad_rows, None, row_of_slot), grad_weights, *grads
