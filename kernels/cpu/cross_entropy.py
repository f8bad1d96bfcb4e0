"""Linear layer and cross-entropy together, some rows at a time: the logits of all rows of a long batch never exist.

The gradients are made in the same pass (as Liger's fused linear cross-entropy does), because the loss is a sum: the
backward only scales them.
"""

import torch
from torch import Tensor

from kernels.cpu import native_cross_entropy, unsupported_dtype
from kernels.cpu.passes import passes


def unsupported(x: Tensor, weight: Tensor, targets: Tensor) -> str | None:
    return unsupported_dtype(x)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_with_grads(x, weight, targets, want_grads=False)[0]


def cross_entropy_with_grads(
    x: Tensor, weight: Tensor, targets: Tensor, want_grads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar float32), and with `want_grads` its gradients by x (N, D, x's dtype) and weight (V, D, float32)."""
    if native_cross_entropy.suits(x, weight):
        return native_cross_entropy.run(x, weight, targets, want_grads)
    w = weight.to(x.dtype)
    loss = 0.0
    grad_x = torch.empty_like(x) if want_grads else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if want_grads else 0, dtype=torch.float32)
    size = max(1, native_cross_entropy.CHUNK_ELEMENTS // len(weight))
    for start in range(0, len(x), size):
        rows, chosen = x[start : start + size], targets[start : start + size]
        logits = rows @ w.t()
        loss += passes().cross_entropy(logits, chosen, want_grads)
        if want_grads:
            torch.mm(logits, w, out=grad_x[start : start + size])
            # An unscored row's zeros must not meet its NaN.
            unscored = (chosen < 0).nonzero().squeeze(1)
            scored = rows.index_fill(0, unscored, 0.0) if len(unscored) else rows
            grad_weight += logits.t() @ scored
    return torch.tensor(loss, dtype=torch.float32), grad_x, grad_weight
