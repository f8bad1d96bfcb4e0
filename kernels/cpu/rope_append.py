from torch import Tensor

from kernels.cpu import unsupported_dtype
from kernels.cpu.rope import rope


def unsupported(q: Tensor, *_: Tensor | None) -> str | None:
    return unsupported_dtype(q)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    kept = (slots >= 0).nonzero().squeeze(1)
    if len(kept) < len(slots):
        k, v, slots = k[kept], v[kept], slots[kept]
    at = slots // k_pages.shape[1], slots % k_pages.shape[1]
    for new, pages, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        if scales is not None:
            new = new.float()
            peak = new.abs().amax(2)
            scales[at] = scale = (peak / 127).masked_fill_(peak == 0, 1.0)
            new = new.div(scale[:, :, None]).add_(0.5).floor_()
        pages[at] = new.to(pages.dtype)
    return q
