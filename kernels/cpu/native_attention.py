"""Causal attention of whole rows in one call of a C++ library (native/row_attention.cpp), see kernels.cpu.pairs.

B rows of T tokens, H query heads, G key-value heads, C channels. Scores go from their product through softmax to the
next one in a core's cache, and those of other documents are not computed. A forward and backward of nano's layer with
several documents in a row took 0.46 to 0.48 of the time of products over memory (4,096 tokens, 2 cores of an EPYC of
2024), and 0.57 to 0.61 where a row is one document.
"""

import ctypes
from ctypes import c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import pairs

QUERIES = 256
"""Tokens of a task; how many there are of a row does not depend on the threads, nor do the bits of its gradients."""


class Shape(ctypes.Structure):
    """`Shape` of row_attention.cpp."""

    _fields_ = [(name, c_int64) for name in ("B", "T", "H", "G", "C", "queries", "threads")]


def document_starts(q: Tensor, documents: Tensor | None) -> Tensor | None:
    """Which token of its row each token sees first, int64 (B, T); None where the library does not suit.

    It takes documents that follow each other, numbered upwards.
    """
    B, T, _, C = q.shape
    if q.dtype != torch.bfloat16 or C % pairs.WIDTH or not pairs.fastest():
        return None
    if documents is None:
        return torch.zeros(B, T, dtype=torch.int64)
    steps = documents.diff(dim=1)
    if bool((steps < 0).any()):
        return None
    return (F.pad(steps.ne(0), (1, 0)) * torch.arange(T)).cummax(1).values


def run(function: str, q: Tensor, k: Tensor, *tensors: Tensor) -> None:
    B, T, H, C = q.shape
    shape = Shape(B, T, H, k.shape[2], C, QUERIES, pairs.threads(q.numel()))
    done = pairs.run("row_attention", function, shape, *tensors)
    assert done, "starts are not those of documents that follow each other"


def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, C) and the log-sum-exp of every query's scores, float32 (B, T, H)."""
    given = [each.contiguous() for each in (q, k, v, starts)]
    out, lse = torch.empty_like(given[0]), torch.empty(q.shape[:3], dtype=torch.float32)
    run("forward", q, k, *given, out, lse)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4)."""
    B, T, G, C = k.shape
    given = [each.contiguous() for each in (grad, q, k, v, starts, out, lse)]
    grad_q = torch.empty_like(given[1])
    parts = torch.zeros(2, B, G, -(-T // QUERIES), T, C)
    run("backward", q, k, *given, grad_q, *parts)
    grad_k, grad_v = (part.sum(2).transpose(1, 2).to(k.dtype) for part in parts)
    return grad_q, grad_k, grad_v
