"""Top-k by repeated argmax (k passes over E logits beat a sort for k << E), then one stable sort of the slots."""

import torch
from torch import Tensor


def unsupported(logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True) -> str | None:
    if logits.dtype != torch.float32:
        return f"routes float32 logits only, not {logits.dtype}"
    if bias is not None and bias.dtype != torch.float32:
        return f"adds float32 biases only, not {bias.dtype}"
    return None


def route(
    logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probability = None if bias is None and normalize else torch.softmax(logits, dim=1)
    left, chosen = logits.clone() if bias is None else probability + bias, []
    for _ in range(top_k):
        # max returns the lowest index among equals on CPU, which is the tie rule.
        index = left.max(dim=1, keepdim=True).indices
        left.scatter_(1, index, float("-inf"))
        chosen.append(index)
    experts = torch.cat(chosen, dim=1)
    weights = torch.softmax(logits.gather(1, experts), dim=1) if normalize else probability.gather(1, experts)
    order = torch.sort(experts.view(-1), stable=True).indices
    offsets = torch.zeros(logits.shape[1] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(experts.view(-1), minlength=logits.shape[1]), 0, out=offsets[1:])
    return weights, experts, order, offsets
