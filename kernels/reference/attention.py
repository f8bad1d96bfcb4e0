import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    _, T, H, C = q.shape
    k, v = (t.float().repeat_interleave(H // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihc,bjhc->bhij", q.float(), k) / math.sqrt(C)
    allowed = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    probabilities = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
    return torch.einsum("bhij,bjhc->bihc", probabilities, v).to(q.dtype)
