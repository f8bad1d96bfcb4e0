import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    total32 = total.float()
    mean_square = (total32 * total32).mean(-1, keepdim=True)
    normed = (total32 / torch.sqrt(mean_square + eps) * weight.float()).to(x.dtype)
    return normed if residual is None else (normed, total)
