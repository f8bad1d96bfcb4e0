"""The router's choices and the slots in the order of their experts: one pass over the logits."""

import torch
from torch import Tensor

from kernels.cpu.passes import passes


def unsupported(logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True) -> str | None:
    if logits.dtype != torch.float32:
        return f"routes float32 logits only, not {logits.dtype}"
    if bias is not None and bias.dtype != torch.float32:
        return f"adds float32 biases only, not {bias.dtype}"
    return None


def route(
    logits: Tensor, top_k: int, bias: Tensor | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not 0 < top_k <= logits.shape[1]:
        raise ValueError(f"top_k = {top_k} must be 1 to {logits.shape[1]}, the number of experts.")
    return passes().route(logits, top_k, bias, normalize)
