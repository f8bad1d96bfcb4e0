import torch
from torch import Tensor


def router_statistics(logits: Tensor, rows: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, E = logits.shape
    log_p = torch.log_softmax(logits, dim=1)
    probability = log_p.exp().view(rows, N // rows, E).mean(1)
    z = torch.logsumexp(logits, dim=1).square().mean()
    log_p = log_p.detach()
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return probability, z, entropy, log_p.exp().amax(1).mean()
