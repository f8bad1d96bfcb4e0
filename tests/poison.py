"""Tensors that lie inside a larger buffer of NaN, so that a read outside them spoils the result and a write shows."""

import torch
from torch import Tensor

MARGIN = 64
"""Poisoned elements on either side."""


def poisoned(x: Tensor) -> Tensor:
    """A contiguous copy of x (any float dtype) with NaN before and after it in memory."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), float("nan"), dtype=x.dtype, device=x.device)
    inside = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    inside.copy_(x)
    inside.buffer = buffer
    return inside.requires_grad_(x.requires_grad)


def assert_margins_untouched(x: Tensor) -> None:
    margins = torch.cat([x.buffer[:MARGIN], x.buffer[-MARGIN:]])
    assert margins.isnan().all(), "something wrote outside the tensor"
