import torch
from torch import Tensor


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A stable descending sort breaks ties by position: the lowest expert first.
    experts = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = torch.softmax(logits.gather(1, experts).float(), dim=-1)
    order = torch.sort(experts.flatten(), stable=True).indices
    counts = (experts.flatten()[:, None] == torch.arange(logits.shape[1], device=logits.device)).sum(0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return weights, experts, order, offsets
