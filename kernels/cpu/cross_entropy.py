"""Linear layer and cross-entropy together, a chunk of rows at a time: the logits of all rows never exist at once.

The gradients are made in the same pass (as Liger's fused linear cross-entropy does), because the loss is a sum: the
backward only scales them.
"""

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype

CHUNK = 1024
"""Rows per chunk: at a vocabulary of 4,096 the float32 logits take 16 MiB."""


def unsupported(x: Tensor, weight: Tensor, targets: Tensor) -> str | None:
    return unsupported_dtype(x)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_with_grads(x, weight, targets, want_grads=False)[0]


def cross_entropy_with_grads(
    x: Tensor, weight: Tensor, targets: Tensor, want_grads: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar float32), and with `want_grads` its gradients by x (N, D, x's dtype) and weight (V, D, float32)."""
    w = weight.to(x.dtype)
    loss = torch.zeros((), dtype=torch.float32)
    grad_x = torch.empty_like(x) if want_grads else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if want_grads else 0, dtype=torch.float32)
    for start in range(0, len(x), CHUNK):
        rows, chosen = x[start : start + CHUNK], targets[start : start + CHUNK]
        unscored = (chosen < 0).nonzero().squeeze(1)
        index = chosen.clamp(min=0)[:, None]
        log_p = torch.log_softmax((rows @ w.t()).float(), dim=1)
        # An unscored row is overwritten, not multiplied by 0, which would let its NaN through.
        loss -= log_p.gather(1, index).index_fill_(0, unscored, 0.0).sum()
        if want_grads:
            p = log_p.exp_()
            p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
            grad_logits = p.index_fill_(0, unscored, 0.0).to(x.dtype)
            grad_x[start : start + CHUNK] = grad_logits @ w
            # Nor may it be multiplied by a 0 here.
            scored = rows.index_fill(0, unscored, 0.0) if len(unscored) else rows
            grad_weight += grad_logits.t() @ scored
    return loss, grad_x, grad_weight
