import math

import torch
from torch import Tensor


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor
) -> Tensor:
    P, (_, H, C) = k_pages.shape[1], q.shape
    out = torch.empty_like(q)
    bounds = query_offsets.tolist()
    for s, length in enumerate(lengths.tolist()):
        first = length - (bounds[s + 1] - bounds[s])
        for i in range(bounds[s], bounds[s + 1]):
            seen = range(first + i - bounds[s] + 1)
            rows = [(page_table[s, t // P], t % P) for t in seen]
            k = torch.stack([k_pages[page, row] for page, row in rows]).float()  # (t, G, C)
            v = torch.stack([v_pages[page, row] for page, row in rows]).float()
            for h in range(H):
                g = h // (H // k.shape[1])
                probabilities = torch.softmax(k[:, g] @ q[i, h].float() / math.sqrt(C), dim=0)
                out[i, h] = (probabilities @ v[:, g]).to(q.dtype)
    return out
