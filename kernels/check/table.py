"""The shipped configurations: which calls of the operations make the launches to check, and what every kernel is.

Operations are called on meta tensors, which hold shapes and no numbers. Sizes are run-time arguments of the kernels, so
many configurations end in the same machine code; it is compiled and checked once, against the strictest call.

N tokens, D hidden width, F expert width, E experts, K experts per token, S sequences, H query heads, G key-value heads,
C channels, P tokens of a page.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.check import CannotCheckError
from kernels.check.rules import Spec
from kernels.gpu import cross_entropy, expert_mlp, grouped_gemm, paged_attention, rms_norm, rope, rope_append, route
from kernels.gpu.launch import A100, H100, Launch, Target, assume, recording

GPUS = {80: A100, 90: H100}

Values = dict[str, Any]
"""Arguments of a launch by name; besides the grid's size `programs`, the GPU's `sms`, `warps` and the `itemsize`."""


class Case(NamedTuple):
    """One call of an operation."""

    name: str
    dtype: torch.dtype
    run: Callable[[], Any]


def gemm(v: Values) -> Spec:
    M, N, K = v["BLOCK_M"], v["BLOCK_N"], v["BLOCK_K"]
    # Up to 64 rows per expert a product waits for the weights, not for the tensor cores.
    kind = "gemm" if M > 64 else "decode"
    programs = -(-v["programs"] // v["sms"])
    return Spec(kind, 2 * M * N * K, (M + N) * K * v["itemsize"], programs=programs, halves=v.get("HALVES", False))


def weight_gradient(v: Values) -> Spec:
    return gemm(v)._replace(kind="wgrad", programs=None)


def attention(v: Values) -> Spec:
    M, N, C = v["BLOCK_M"], v["BLOCK_N"], v["BLOCK_C"]
    int8 = v["k_pages"].dtype == torch.int8
    return Spec(
        "attention", 4 * M * N * C, 2 * N * C * v["k_pages"].itemsize, rows=M, width=8 if int8 else 16,
        narrow_loads=4 if int8 else 1, narrow_stores=1,
    )  # fmt: skip


def stream(v: Values, loads: int = 0, stores: int = 0) -> Spec:
    """A kernel that moves rows; so many loads and stores of scalars beside them may be narrow."""
    elements = math.prod(v.get(name, 1) for name in ("ROWS", "HEADS", "BLOCK", "BLOCK_D"))
    # A tile that leaves a thread fewer than 16 bytes cannot fill its loads.
    width = min(16, elements * v["itemsize"] // (32 * v["warps"]))
    return Spec("stream", width=width, narrow_loads=loads, narrow_stores=stores)


def small(v: Values) -> Spec:
    return Spec("small")


KERNELS: dict[str, Callable[[Values], Spec]] = {
    "cross_entropy.row_kernel": lambda v: stream(v, loads=2, stores=1),
    "expert_mlp.up_kernel": gemm,
    "expert_mlp.swiglu_backward_kernel": lambda v: gemm(v)._replace(narrow_stores=3 if v["HALVES"] else 2),
    "grouped.rows_kernel": gemm,
    "grouped.schedule_kernel": small,
    "paged_attention.attend_splits": attention,
    "paged_attention.merge_splits": small,
    "permute.combine_kernel": lambda v: stream(v, loads=v["CHOICES"] * v["ROWS"]),
    "permute.gather_kernel": lambda v: stream(v, loads=v["ROWS"]),
    "rms_norm.backward_kernel": lambda v: stream(v, loads=3),
    "rms_norm.forward_kernel": lambda v: stream(v, loads=1, stores=1),
    "rope.rope_kernel": stream,
    "rope_append.rope_append_kernel": lambda v: stream(v, loads=1, stores=0 if v["k_scales"] is None else 6),
    "route.add_counts_kernel": small,
    "route.choose_kernel": small,
    "route.place_kernel": small,
    "weight_gradient.finish_kernel": lambda v: stream(v, loads=4),
    "weight_gradient.gradient_kernel": weight_gradient,
}
"""What every kernel is, by module and function. A launch of a kernel that is not here is an error."""


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def experts(N: int, D: int, F: int, E: int, K: int, dtype: torch.dtype, training: bool = True) -> Case:
    def run() -> None:
        x, gate_up, down = meta(N, D, dtype=dtype), meta(E, 2 * F, D, dtype=dtype), meta(E, D, F, dtype=dtype)
        args = (x, meta(N, K, dtype=torch.float32), meta(N, K), meta(N * K), meta(E + 1), gate_up, down)
        if training:
            out, *saved = expert_mlp.expert_mlp_forward(*args)
            expert_mlp.expert_mlp_backward(out, *args, *saved)
        else:
            expert_mlp.expert_mlp(*args)

    return Case(f"experts, {N} tokens, {D} x {F}, {K} of {E}", dtype, run)


def choices(N: int, E: int, K: int, biased: bool = False, normalize: bool = True) -> Case:
    def run() -> None:
        bias = meta(E, dtype=torch.float32) if biased else None
        route.route(meta(N, E, dtype=torch.float32), K, bias, normalize)

    kind = f"route{' by biased scores' if biased else ''}{'' if normalize else ' not normalised'}"
    return Case(f"{kind}, {N} tokens, {K} of {E}", torch.float32, run)


def groups(M: int, D: int, F: int, E: int, dtype: torch.dtype, backward: bool = True) -> Case:
    def run() -> None:
        args = (meta(M, D, dtype=dtype), meta(E, F, D, dtype=dtype), meta(E + 1))
        out = grouped_gemm.grouped_gemm(*args)
        if backward:
            grouped_gemm.grouped_gemm_backward(out, *args)

    return Case(f"grouped gemm, {M} rows, {D} x {F}, {E} groups", dtype, run)


def cache(S: int, queries: int, H: int, G: int, C: int, P: int, dtype: torch.dtype, int8: bool = False) -> Case:
    def run() -> None:
        width = 8192 // P
        keys = meta(S * width, P, G, C, dtype=torch.int8 if int8 else dtype)
        scales = (meta(S * width, P, G, dtype=torch.float32),) * 2 if int8 else ()
        q, table = meta(S * queries, H, C, dtype=dtype), meta(S, width)
        paged_attention.paged_attention(q, keys, keys, table, meta(S + 1), meta(S), *scales)

    kind = "int8 cache" if int8 else "cache"
    return Case(f"{kind}, {S} x {queries} queries, {H} heads on {G} of {C}, pages of {P}", dtype, run)


def norm(N: int, D: int, dtype: torch.dtype, residual: bool = False) -> Case:
    def run() -> None:
        x, weight, extra = meta(N, D, dtype=dtype), meta(D, dtype=dtype), meta(N, D, dtype=dtype) if residual else None
        out, *_, r = rms_norm.forward(x, weight, 1e-6, extra)
        rms_norm.rms_norm_backward(out, x, weight, r, extra)

    return Case(f"rms norm, {N} x {D}{', residual' if residual else ''}", dtype, run)


def loss(N: int, D: int, V: int, dtype: torch.dtype) -> Case:
    def run() -> None:
        cross_entropy.cross_entropy_with_grads(meta(N, D, dtype=dtype), meta(V, D, dtype=dtype), meta(N))

    return Case(f"cross entropy, {N} x {D}, {V} classes", dtype, run)


def rotary(N: int, H: int, C: int, dtype: torch.dtype) -> Case:
    def run() -> None:
        angles = meta(N, C // 2, dtype=torch.float32)
        rope.rope(meta(N, H, C, dtype=dtype), angles, angles)

    return Case(f"rope, {N} tokens, {H} heads of {C}", dtype, run)


def append(n: int, H: int, G: int, C: int, P: int, dtype: torch.dtype, int8: bool = False) -> Case:
    def run() -> None:
        angles, pages = meta(n, C // 2, dtype=torch.float32), meta(1024, P, G, C, dtype=torch.int8 if int8 else dtype)
        q, k = meta(n, H, C, dtype=dtype), meta(n, G, C, dtype=dtype)
        scales = (meta(1024, P, G, dtype=torch.float32),) * 2 if int8 else ()
        rope_append.rope_append(q, k, k, angles, angles, pages, pages, meta(n), *scales)

    return Case(f"{'int8 ' if int8 else ''}append, {n} tokens, {H} heads on {G} of {C}, pages of {P}", dtype, run)


def cases(only: str = "") -> list[Case]:
    """The shipped configurations with `only` in their name."""
    return [case for case in shipped() if only in case.name]


def shipped() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for N, E, K in ((8192, 16, 2), (8192, 64, 8), (16, 16, 2)):
        yield choices(N, E, K)
    for N, E, K in ((8192, 64, 8), (16, 16, 2)):
        yield choices(N, E, K, biased=True)
        yield choices(N, E, K, normalize=False)
    yield choices(8192, 256, 8, biased=True, normalize=False)
    for N in (8192, 1024, 256):
        yield experts(N, 2048, 4096, 16, 2, bf16)
    yield experts(8192, 4096, 14336, 8, 2, bf16)
    yield experts(8192, 2048, 768, 64, 8, bf16)
    yield experts(8192, 1024, 1024, 16, 2, bf16)
    yield experts(512, 512, 512, 16, 2, bf16)
    for N in (1, 16, 32, 64):
        yield experts(N, 2048, 4096, 16, 2, bf16, training=False)
    yield groups(16384, 2048, 4096, 16, bf16)
    yield groups(16384, 2048, 4096, 16, fp16, backward=False)
    yield experts(1024, 512, 512, 16, 2, fp32)
    yield cache(1, 1, 16, 1, 128, 64, bf16)
    for queries in (1, 4, 16):
        for H, G in ((16, 1), (128, 1), (32, 8)):
            yield cache(32, queries, H, G, 128, 64, bf16)
    for C in (64, 256):
        yield cache(32, 1, 16, 1, C, 64, bf16)
    yield cache(32, 1, 16, 1, 128, 16, bf16)
    yield cache(32, 1, 16, 1, 128, 64, bf16, int8=True)
    yield cache(32, 4, 128, 1, 128, 16, bf16, int8=True)
    yield cache(32, 1, 16, 1, 128, 64, fp16)
    yield cache(32, 1, 16, 1, 128, 64, fp32)
    for D in (512, 2048, 8192):
        yield norm(8192, D, bf16)
    yield norm(8192, 2048, bf16, residual=True)
    yield norm(8192, 2048, fp32)
    yield loss(8192, 2048, 32768, bf16)
    yield rotary(8192, 16, 128, bf16)
    yield append(32, 16, 1, 128, 64, bf16)
    yield append(32, 32, 8, 128, 64, bf16)
    yield append(32, 16, 1, 128, 64, bf16, int8=True)


def launches(case: Case, gpu: Target) -> list[Launch]:
    with assume(gpu), recording() as found:
        case.run()
    return found


def name_of(launch: Launch) -> str:
    """As in KERNELS."""
    return f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"


def spec(launch: Launch, dtype: torch.dtype, gpu: Target) -> Spec:
    """What the launched kernel's source says. Raises CannotCheckError for a kernel that is not in the table."""
    name = name_of(launch)
    if name not in KERNELS:
        raise CannotCheckError(f"{name} is launched and not in kernels.check.table.KERNELS, so nothing would check it.")
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    values |= {"programs": math.prod(launch.grid), "sms": gpu.sms}
    return KERNELS[name](values | {"warps": launch.meta.get("num_warps", 4), "itemsize": dtype.itemsize})
