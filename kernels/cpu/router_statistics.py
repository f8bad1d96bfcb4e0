"""What the router is charged for, and watched by: one pass over the logits, and one back."""

import torch
from torch import Tensor

from kernels.cpu.passes import passes


def unsupported(logits: Tensor, rows: int = 1) -> str | None:
    return None if logits.dtype == torch.float32 else f"takes float32 logits only, not {logits.dtype}"


def router_statistics(logits: Tensor, rows: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return passes().router_statistics(logits, rows)


def router_statistics_backward(logits: Tensor, grad_probability: Tensor, grad_z: Tensor) -> Tensor:
    return passes().router_statistics_backward(logits, grad_probability, grad_z)
