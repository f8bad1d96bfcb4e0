"""Linear layer and cross-entropy together, a chunk of rows at a time: the logits of all rows never exist at once.

As in Liger's fused linear cross-entropy (Hsu et al. 2024, section 3.2) a chunk's logits come from one GEMM, a kernel
with one program per row makes the loss and, in place, the gradient by the logits, and two more GEMMs take that to the
gradients. They are made in the forward pass because the loss is a sum: the backward only scales them.

N rows, D hidden width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import unsupported_dtype
from kernels.gpu.launch import launch

BLOCK = 4096
"""Logits that a program reads at a time: two vectors of bfloat16 a thread."""


def unsupported(x: Tensor, weight: Tensor, targets: Tensor) -> str | None:
    return unsupported_dtype(x)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_with_grads(x, weight, targets, want_grads=False)[0]


def cross_entropy_with_grads(
    x: Tensor, weight: Tensor, targets: Tensor, want_grads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar float32), and with `want_grads` its gradients by x (N, D, x's dtype) and weight (V, D, float32)."""
    (N, D), V = x.shape, len(weight)
    w = weight.to(x.dtype)
    losses = x.new_empty(N, dtype=torch.float32)
    grad_x = torch.empty_like(x) if want_grads else x.new_empty(0)
    grad_weight = x.new_zeros(weight.shape if want_grads else 0, dtype=torch.float32)
    size = chunk_rows(N, D, V)
    for start in range(0, N, size):
        chunk = slice(start, start + size)
        # A row that is not scored may hold NaN, which a gradient of 0 would not keep out of the weight's.
        rows = x[chunk].masked_fill(targets[chunk, None] < 0, 0.0)
        logits = rows @ w.t()
        launch(
            row_kernel, (len(rows),), logits, targets[chunk], losses[chunk], V,
            BLOCK=min(BLOCK, triton.next_power_of_2(V)), WANT_GRADS=want_grads, num_warps=8, num_stages=1,
        )  # fmt: skip
        if want_grads:
            torch.mm(logits, w, out=grad_x[chunk])
            grad_weight += logits.t() @ rows
    return losses.sum(), grad_x, grad_weight


def chunk_rows(N: int, D: int, V: int) -> int:
    """Rows of a chunk: its logits take about as much memory as x or the weight, whichever is larger.

    Liger's rule is x alone. Where V is far larger than N that makes chunks of few rows, each of which reads the weight
    twice and its gradient too.
    """
    return max(1, min(N, triton.next_power_of_2(triton.cdiv(max(N, V) * D, V))))


@triton.jit
def row_kernel(logits, targets, losses, V, BLOCK: tl.constexpr, WANT_GRADS: tl.constexpr):
    """Loss of one row, and softmax - one_hot in place of its logits; exact zeros where the target is negative."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row)
    scored = target >= 0
    # Read before any reduction, behind whose barrier other warps write their gradients.
    chosen = tl.load(logits + target, scored, other=0.0).to(tl.float32)
    top, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, v < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(x - larger), 0)
        top = larger
    tl.store(losses + row, tl.where(scored, top + tl.log(total) - chosen, 0.0))
    if WANT_GRADS:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(logits + v, v < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top) / total - (v == target).to(tl.float32)
            tl.store(logits + v, tl.where(scored, p, 0.0), v < V)
