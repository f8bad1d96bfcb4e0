import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    mean_square = (x32 * x32).mean(-1, keepdim=True)
    return (x32 / torch.sqrt(mean_square + eps) * weight.float()).to(x.dtype)
