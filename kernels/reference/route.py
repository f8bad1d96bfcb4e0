import torch
from torch import Tensor


def route(
    logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probability = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    score = logits if bias is None else probability + bias
    # A stable descending sort breaks ties by position: the lowest expert first.
    experts = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = probability.gather(1, experts)
    if normalize:
        # As `weights / weights.sum(1)`, which is 0 / 0 where every chosen probability is rounded to 0.
        weights = torch.softmax(logits.gather(1, experts).to(weights.dtype), dim=-1)
    ordered, order = torch.sort(experts.flatten(), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(logits.shape[1] + 1, device=logits.device))
    return weights, experts, order, offsets
