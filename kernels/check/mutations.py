"""Mistakes made on purpose in shipped kernels, each of which one rule must notice: a gate that nothing fails is none.

A mistake changes the tile that the launcher asks for, the arguments of a recorded launch, or a line of the kernel's
source. The kernel as it is shipped must not break the same rule, else its breach would show nothing.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import tiles
from kernels.check import CannotCheckError, table
from kernels.check.compile import assume_target, build
from kernels.check.gate import Compiled, Row, check, read
from kernels.check.rules import breaches
from kernels.check.table import Case
from kernels.gpu import paged_attention
from kernels.gpu.launch import Launch, Target

BF16 = torch.bfloat16
TRAINING = table.experts(8192, 2048, 4096, 16, 2, BF16)
DECODE = table.experts(16, 2048, 4096, 16, 2, BF16, training=False)
CACHE = table.cache(32, 1, 16, 1, 128, 64, BF16)
NORM = table.norm(8192, 2048, BF16)

Make = Callable[["Mutation", Target], Launch]


class Mutation(NamedTuple):
    mistake: str
    case: Case
    kernel: str
    """As in table.KERNELS; of several launches the first."""
    make: Make
    rules: dict[int, str]
    """The rule that must notice, by architecture; those that are not here do not know the mistake."""


class Result(NamedTuple):
    mistake: str
    arch: str
    kernel: str
    rule: str
    breaks: list[str]
    """All rules that the mistake breaks."""
    noticed: bool


def pick(launches: list[Launch], kernel: str) -> Launch:
    return next(launch for launch in launches if table.name_of(launch) == kernel)


def shipped(mutation: Mutation, gpu: Target) -> Launch:
    return pick(table.launches(mutation.case, gpu), mutation.kernel)


def retile(module: Any, function: str, **changes: Any) -> Make:
    """Launch with a tile that differs in `changes` from what `module.function` chooses."""

    def make(mutation: Mutation, gpu: Target) -> Launch:
        choose = getattr(module, function)
        setattr(module, function, lambda *args: choose(*args)._replace(**changes))
        try:
            return shipped(mutation, gpu)
        finally:
            setattr(module, function, choose)

    return make


def argue(change: Callable[[Any], Any], *names: str) -> Make:
    """Launch with some arguments changed."""

    def make(mutation: Mutation, gpu: Target) -> Launch:
        launch = shipped(mutation, gpu)
        named = zip(launch.kernel.arg_names, launch.args, strict=False)
        return launch._replace(args=tuple(change(value) if name in names else value for name, value in named))

    return make


def misaligned(x: Tensor) -> Tensor:
    """The same tensor, one element further on in memory."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def odd(size: int) -> int:
    return size - 1


def rewrite(old: str, new: str) -> Make:
    """Launch the kernel of its module's source with `old` replaced by `new`."""

    def make(mutation: Mutation, gpu: Target) -> Launch:
        launch = shipped(mutation, gpu)
        source = Path(sys.modules[launch.kernel.__module__].__file__).read_text("utf-8")
        if old not in source:
            raise CannotCheckError(
                f"The mistake {mutation.mistake!r} changes {old!r}, which {mutation.kernel} no longer has."
            )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.py"
            file.write_text(source.replace(old, new), "utf-8")
            spec = importlib.util.spec_from_file_location(launch.kernel.__module__, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return launch._replace(kernel=getattr(module, launch.kernel.__name__))

    return make


def repage(**changes: Any) -> Make:
    return retile(paged_attention, "paged_tile", **changes)


def both(rule: str) -> dict[int, str]:
    return {80: rule, 90: rule}


UP, ROWS, GRADIENT = "expert_mlp.up_kernel", "grouped.rows_kernel", "weight_gradient.gradient_kernel"
ATTEND, COMBINE, NORMED = "paged_attention.attend_splits", "permute.combine_kernel", "rms_norm.forward_kernel"
KNOWN = "@triton.jit\ndef forward_kernel("
UNKNOWN = '@triton.jit(do_not_specialize=["D"])\ndef forward_kernel('
LOOP = "for step in range(begin, stop, BLOCK_K):"
SPECIALISED = "for step in tl.range(begin, stop, BLOCK_K, warp_specialize=True):"
DOT = 'tl.dot(x, y, accumulator, input_precision="ieee")'
IN_FLOAT32 = "tl.dot(x.to(tl.float32), y.to(tl.float32), accumulator)"
OF_EXPONENTIALS = "tl.dot(tl.exp2(x.to(tl.float32)).to(y.dtype), y, accumulator)"
ROWS_LOOP = "for row in range(0, whole, BLOCK_K):"
WRITTEN_OUT = "for row in tl.static_range(0, 256, BLOCK_K):"
LOADS = "x, y = tl.load(a_pointers), tl.load(b_pointers)"
GATHERED = "x, y = tl.load(a_pointers), tl.load(b + tl.load(offsets + row + k)[:, None] * B + n[None, :])"
TRANSPOSED = "x, y = tl.load(a + (row + k).to(tl.int64)[:, None] * A + m[None, :]).T, tl.load(b_pointers)"

MUTATIONS = [
    Mutation("one stage", TRAINING, UP, retile(tiles, "expert_gemm", num_stages=1), {80: "SYNC_LDG", 90: "WGMMA_SYNC"}),
    Mutation("one stage", TRAINING, GRADIENT, retile(tiles, "weight_gradient", num_stages=1), {80: "NO_ASYNC"}),
    Mutation("two stages", TRAINING, ROWS, retile(tiles, "expert_gemm", num_stages=2), {80: "DEPTH"}),
    Mutation("six stages", TRAINING, UP, retile(tiles, "expert_gemm", num_stages=6), both("SMEM")),
    Mutation("half the warps", TRAINING, ROWS, retile(tiles, "expert_gemm", num_warps=4), both("SPILL")),
    Mutation("narrow tile", TRAINING, ROWS, retile(tiles, "expert_gemm", block_n=64), both("SMEM_BW")),
    Mutation("short steps", TRAINING, ROWS, retile(tiles, "expert_gemm", block_k=16), {90: "ISSUE"}),
    Mutation("two programs instead of one", TRAINING, ROWS, retile(tiles, "expert_gemm", occupancy=2), both("OCC")),
    Mutation("misaligned rows", TRAINING, UP, argue(misaligned, "x"), both("LOAD_WIDTH")),
    Mutation("misaligned weights of half tiles", TRAINING, ROWS, argue(misaligned, "b_half"), {80: "LOAD_WIDTH"}),
    Mutation("misaligned result", DECODE, ROWS, argue(misaligned, "out"), both("STORE_WIDTH")),
    Mutation("misaligned input", TRAINING, COMBINE, argue(misaligned, "y"), both("LOAD_WIDTH")),
    Mutation("misaligned pages", CACHE, ATTEND, argue(misaligned, "k_pages"), both("LOAD_WIDTH")),
    Mutation("odd width", DECODE, UP, argue(odd, "D"), both("LOAD_WIDTH")),
    Mutation("odd width", NORM, NORMED, argue(odd, "D"), both("STORE_WIDTH")),
    Mutation("odd stride", CACHE, ATTEND, argue(odd, "stride_kt"), both("LOAD_WIDTH")),
    Mutation("width not specialised on", NORM, NORMED, rewrite(KNOWN, UNKNOWN), both("LOAD_WIDTH")),
    Mutation("float32 operands", TRAINING, ROWS, rewrite(DOT, IN_FLOAT32), both("MMA_DTYPE")),
    Mutation("an exponential per operand", TRAINING, ROWS, rewrite(DOT, OF_EXPONENTIALS), both("LOOP_JUNK")),
    Mutation("warp specialisation", TRAINING, ROWS, rewrite(LOOP, SPECIALISED), both("WS_DROPPED")),
    Mutation("loop written out", TRAINING, GRADIENT, rewrite(ROWS_LOOP, WRITTEN_OUT), both("NO_LOOP")),
    Mutation("rows found in the loop", TRAINING, GRADIENT, rewrite(LOADS, GATHERED), {80: "DEPTH"}),
    Mutation("left operand transposed", TRAINING, GRADIENT, rewrite(LOADS, TRANSPOSED), {80: "SYNC_LDG"}),
    Mutation("decode in two stages", DECODE, ROWS, retile(tiles, "decode_gemm", num_stages=2), both("INFLIGHT_KB")),
    Mutation("weights on the right", DECODE, ROWS, retile(tiles, "decode_gemm", swap=False), {90: "MMA_KIND"}),
    Mutation("pages in three stages", CACHE, ATTEND, repage(num_stages=3), both("DEPTH")),
    Mutation("few keys", CACHE, ATTEND, repage(block_n=16), {90: "INFLIGHT_KB"}),
    Mutation("more warps than rows", CACHE, ATTEND, repage(block_m=16, block_n=32, num_warps=8), both("LOOP_FLOPS")),
]  # fmt: skip


def chosen(only: str = "") -> list[Mutation]:
    """The mistakes with `only` in their name."""
    return [mutation for mutation in MUTATIONS if only in mutation.mistake]


def run(arch: int, only: str = "") -> list[Result]:
    """What the rules say of the mistakes with `only` in their name. For one architecture per process."""
    assume_target(arch)
    gpu = table.GPUS[arch]
    known = [mutation for mutation in chosen(only) if arch in mutation.rules]
    launches = [(m, launch) for m in known for launch in (m.make(m, gpu), shipped(m, gpu))]
    compiled = [
        Compiled(launch, build(launch), table.spec(launch, m.case.dtype, gpu), m.case.dtype) for m, launch in launches
    ]
    broken = [list(breaches(kernel)) for kernel in read(compiled, gpu)]
    return [
        Result(m.mistake, f"sm_{arch}", m.kernel, rule, bad, noticed=rule in bad and rule not in unchanged)
        for m, bad, unchanged in zip(known, broken[::2], broken[1::2], strict=True)
        for rule in [m.rules[arch]]
    ]


def check_all(arch: int, only: str, self_test: bool) -> tuple[list[Row], list[Result]]:
    """The verdicts on what is shipped, and in a self-test on the mistakes, which share what was compiled."""
    return check(arch, only), run(arch, only) if self_test else []
