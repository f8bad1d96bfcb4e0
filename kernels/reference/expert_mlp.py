import torch
import torch.nn.functional as F
from torch import Tensor


def expert_mlp(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    # Nothing here reads the sorted order: the definition visits each expert and asks which tokens chose it.
    x32, out = x.float(), torch.zeros_like(x, dtype=torch.float32)
    for e in range(gate_up.shape[0]):
        weight_of_token = (weights * (experts == e)).sum(1)
        gate, up = (x32 @ gate_up[e].float().T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down[e].float().T
        chosen = (experts == e).any(1, keepdim=True)
        out = out + torch.where(chosen, weight_of_token[:, None] * y, 0.0)
    return out.to(x.dtype)
