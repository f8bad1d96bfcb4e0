"""Projection to the vocabulary and cross-entropy in one call of a C++ library (native/cross_entropy.cpp).

N tokens, D hidden width, V vocabulary. See kernels.cpu.pairs.
"""

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from kernels.cpu import pairs

CHUNK_ELEMENTS = 1 << 24
"""Logits, or their gradients, that exist at a time: 32 MiB of bfloat16, 2,048 rows at a vocabulary of 8,192."""


class Shape(ctypes.Structure):
    """`Shape` of cross_entropy.cpp."""

    _fields_ = [(name, c_int64) for name in ("N", "D", "V", "threads", "chunk", "float_weight", "gradients")]


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether it takes tokens x (N, D), of which there are some, and a weight (V, D), and is the fastest here."""
    known = x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32)
    return known and len(x) > 0 and all(size % pairs.WIDTH == 0 for size in weight.shape) and pairs.fastest()


def run(x: Tensor, weight: Tensor, targets: Tensor, want_grads: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, a float32 scalar, and with `want_grads` its gradients by x (N, D), bfloat16, and weight (V, D), float32.

    targets (N,) are int64, negative where none counts. A weight of float32 is rounded as it is read. Raises IndexError
    for a target beyond the vocabulary.
    """
    (N, D), V = x.shape, len(weight)
    chunk = max(2, CHUNK_ELEMENTS // V // 2 * 2)
    shape = Shape(N, D, V, pairs.threads(N * V), chunk, weight.dtype == torch.float32, want_grads)
    loss = torch.empty(1, dtype=torch.float64)
    grad_x = x.new_empty(x.shape if want_grads else 0)
    grad_weight = torch.empty(weight.shape if want_grads else 0, dtype=torch.float32)
    given = [each.contiguous() for each in (x, weight, targets)]
    if not pairs.run("cross_entropy", "cross_entropy", shape, *given, loss, grad_x, grad_weight):
        raise IndexError(
            f"target {targets.max()} is not in a vocabulary of {V}: it must be less, or negative to count for nothing."
        )
    return loss.float().squeeze(), grad_x, grad_weight
