import torch
from torch import Tensor


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scored = targets >= 0
    # Masked twice: a NaN in an unscored row must reach neither the sum nor, as 0 * NaN, a gradient.
    rows = torch.where(scored[:, None], x, 0.0)
    logits = rows.float() @ weight.to(x.dtype).float().T
    chosen = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(scored, torch.logsumexp(logits, dim=1) - chosen, 0.0).sum()
