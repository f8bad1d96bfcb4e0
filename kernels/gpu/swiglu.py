"""torch's own operations: dense MLPs are the baseline here, and the experts' SwiGLU is part of their product."""

import torch
from torch import Tensor

PLAIN = True


def unsupported(hidden: Tensor) -> str | None:
    return None


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
