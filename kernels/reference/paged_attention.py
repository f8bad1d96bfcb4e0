import math

import torch
from torch import Tensor


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    P, (_, H, C) = k_pages.shape[1], q.shape

    def read(pages: Tensor, scales: Tensor | None, rows: list[tuple[int, int]]) -> Tensor:
        tokens = torch.stack([pages[page, row] for page, row in rows]).float()  # (t, G, C)
        return tokens if scales is None else tokens * torch.stack([scales[page, row] for page, row in rows])[..., None]

    out = torch.empty_like(q)
    bounds = query_offsets.tolist()
    for s, length in enumerate(lengths.tolist()):
        first = length - (bounds[s + 1] - bounds[s])
        for i in range(bounds[s], bounds[s + 1]):
            seen = range(first + i - bounds[s] + 1)
            rows = [(page_table[s, t // P], t % P) for t in seen]
            k, v = read(k_pages, k_scales, rows), read(v_pages, v_scales, rows)
            for h in range(H):
                g = h // (H // k.shape[1])
                probabilities = torch.softmax(k[:, g] @ q[i, h].float() / math.sqrt(C), dim=0)
                out[i, h] = (probabilities @ v[:, g]).to(q.dtype)
    return out
