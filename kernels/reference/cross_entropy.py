import torch
from torch import Tensor


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scored = targets >= 0
    logits = x[scored].float() @ weight.to(x.dtype).float().T
    chosen = logits.gather(1, targets[scored][:, None]).squeeze(1)
    return (torch.logsumexp(logits, dim=1) - chosen).sum()
