"""One oneDNN GEMM per group, with row counts rounded up to few sizes.

oneDNN compiles a kernel for every new shape: with raw row counts, which differ in every step, a training step measured
five times slower. `padded_layout` gives each group a region of a multiple of `bucket` rows.
"""

import itertools

import torch
from torch import Tensor

from kernels.cpu import unsupported_dtype


def unsupported(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return unsupported_dtype(x)


def bucket(rows: int) -> int:
    """The smallest size of at least `rows` among 0, 8, 16 ... 64, then 8 evenly spaced ones per doubling: 72 to 128,
    144 to 256 and so on. At most an eighth of the rows is padding, and up to 8,192 rows there are 64 sizes."""
    step = max(8, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def padded_layout(counts: list[int]) -> tuple[list[int], list[int]]:
    """Start of each group's padded region, and their total as last entry; and the regions' sizes."""
    sizes = [bucket(count) for count in counts]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts, sizes


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    out = x.new_empty(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            rows = x[start:end]
            padded = torch.nn.functional.pad(rows, (0, 0, 0, bucket(end - start) - (end - start)))
            out[start:end] = (padded @ weight[e].to(x.dtype).t())[: end - start]
    return out


def grouped_gemm_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (M, D) and weight (E, F, D, in weight's dtype)."""
    grad_weight = torch.zeros_like(weight)
    bounds = offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            grad_weight[e] = grad[start:end].t() @ x[start:end]
    return grouped_gemm(grad, weight.transpose(1, 2), offsets), grad_weight
