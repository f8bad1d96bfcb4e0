"""Rotary embedding of new queries and keys, and the keys and values into a paged cache, in one small kernel.

n new tokens, H query heads, G key-value heads, C channels of a head, P tokens per page.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import unsupported_dtype
from kernels.gpu.launch import launch
from kernels.gpu.rope import turn

HEADS = 16
"""Heads of one token that a program handles at most: one token of many heads still meets several programs."""


def unsupported(q: Tensor, *_: Tensor | None) -> str | None:
    return unsupported_dtype(q)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (n, H, C), G = q.shape, k.shape[1]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = min(HEADS, triton.next_power_of_2(max(H, G)))
    query_blocks = triton.cdiv(H, heads)
    block = triton.next_power_of_2(C // 2)
    launch(
        rope_append_kernel, (n, query_blocks + triton.cdiv(G, heads)),
        q, k, v, cos, sin, out, k_pages, v_pages, k_scales, v_scales, slots, H, G, C // 2, k_pages.shape[1],
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        *strides(k_scales), *strides(v_scales),
        QUERY_BLOCKS=query_blocks, HEADS=heads, BLOCK=block, num_warps=max(1, min(8, heads * block // 256)),
        num_stages=1,
    )  # fmt: skip
    return out


def strides(scales: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scales is None else scales.stride()


@triton.jit
def rope_append_kernel(
    q, k, v, cos, sin, out, k_pages, v_pages, k_scales, v_scales, slots, H, G, HALF, P,
    stride_qn, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg,
    stride_kpp, stride_kpt, stride_kpg, stride_vpp, stride_vpt, stride_vpg,
    stride_ksp, stride_kst, stride_ksg, stride_vsp, stride_vst, stride_vsg,
    QUERY_BLOCKS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + n)
    if block < QUERY_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < H) & (c < HALF)
        first, second = load_turned(q + n * stride_qn + head * stride_qh + c, cos, sin, n, c, inside, HALF)
        target = out + (n * H + head) * (2 * HALF) + c
        tl.store(target, first, inside)
        tl.store(target + HALF, second, inside)
    elif slot >= 0:
        head = (block - QUERY_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
        page, token = slot // P, slot % P
        k_row = k_pages + page * stride_kpp + token * stride_kpt
        v_row = v_pages + page * stride_vpp + token * stride_vpt
        k_scale = k_scales if k_scales is None else k_scales + page * stride_ksp + token * stride_kst
        v_scale = v_scales if v_scales is None else v_scales + page * stride_vsp + token * stride_vst
        inside = (head < G) & (c < HALF)
        first, second = load_turned(k + n * stride_kn + head * stride_kg + c, cos, sin, n, c, inside, HALF)
        write(first, second, k_row + head * stride_kpg + c, k_scale, head * stride_ksg, head < G, inside, HALF)
        first, second = load_turned(v + n * stride_vn + head * stride_vg + c, None, None, n, c, inside, HALF)
        write(first, second, v_row + head * stride_vpg + c, v_scale, head * stride_vsg, head < G, inside, HALF)


@triton.jit
def load_turned(source, cos, sin, n, c, inside, HALF):
    """Both halves of some heads of token n, turned where there are angles, as float32 that holds source's dtype."""
    first = tl.load(source, inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, inside, other=0.0).to(tl.float32)
    if cos is not None:
        cosine = tl.load(cos + n * HALF + c, c < HALF, other=0.0)
        sine = tl.load(sin + n * HALF + c, c < HALF, other=0.0)
        first, second = turn(first, second, cosine, sine)
        dtype: tl.constexpr = source.dtype.element_ty
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    return first, second


@triton.jit
def write(first, second, row, scales, at, exists, inside, HALF):
    """One token's heads into its row of the cache, as integers of the heads' own scales where there are scales."""
    if scales is not None:
        peak = tl.maximum(tl.max(tl.abs(first), 1, keep_dims=True), tl.max(tl.abs(second), 1, keep_dims=True))
        # A maximum passes over NaN, which must not turn into an innocent integer.
        peak += tl.sum((first + second) * 0.0, 1, keep_dims=True)
        scale = tl.where(peak == 0.0, 1.0, tl.div_rn(peak, 127.0))
        tl.store(scales + at, scale, exists)
        first = tl.floor(tl.div_rn(first, scale) + 0.5)
        second = tl.floor(tl.div_rn(second, scale) + 0.5)
    tl.store(row, first.to(row.dtype.element_ty), inside)
    tl.store(row + HALF, second.to(row.dtype.element_ty), inside)
