import torch
from torch import Tensor


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
