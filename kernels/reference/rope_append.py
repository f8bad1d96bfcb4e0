import torch
from torch import Tensor

from kernels.reference.rope import rope


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, token = divmod(slot, k_pages.shape[1])
            for new, pages, scales in ((k[n], k_pages, k_scales), (v[n], v_pages, v_scales)):
                if scales is None:
                    pages[page, token] = new
                else:
                    peak = new.float().abs().amax(1)
                    scale = torch.where(peak == 0, 1.0, peak / torch.full_like(peak, 127))
                    scales[page, token] = scale
                    pages[page, token] = torch.floor(new.float() / scale[:, None] + 0.5)
    return q
