"""Top-k by repeated argmax (k passes over E logits beat a sort for k << E), then one stable sort of the slots."""

import torch
from torch import Tensor


def unsupported(logits: Tensor, top_k: int) -> str | None:
    return None if logits.dtype == torch.float32 else f"routes float32 logits only, not {logits.dtype}"


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left, chosen, values = logits.clone(), [], []
    for _ in range(top_k):
        # max returns the lowest index among equals on CPU, which is the tie rule.
        value, index = left.max(dim=1, keepdim=True)
        left.scatter_(1, index, float("-inf"))
        chosen.append(index)
        values.append(value)
    experts = torch.cat(chosen, dim=1)
    weights = torch.softmax(torch.cat(values, dim=1), dim=1)
    order = torch.sort(experts.view(-1), stable=True).indices
    offsets = torch.zeros(logits.shape[1] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(experts.view(-1), minlength=logits.shape[1]), 0, out=offsets[1:])
    return weights, experts, order, offsets


def route_backward(grad_weights: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Gradient of the logits (N, E): softmax's, scattered to the chosen experts."""
    inner = weights * (grad_weights - (grad_weights * weights).sum(1, keepdim=True))
    return torch.zeros(len(weights), num_experts).scatter_(1, experts, inner)
