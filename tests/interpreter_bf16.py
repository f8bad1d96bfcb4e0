"""bfloat16 in Triton's interpreter, which keeps it as uint16 bit patterns and computes with those as if they were
integers (triton-lang/triton#11584, checked in 3.6, 3.7.1 and 3.9).

`install` wraps the builder's arithmetic, comparisons and dot and the numpy short cuts of reductions and scans, so that
each sees float32 and its result is rounded to nearest even, and replaces the casts, of which the one from float32 cut
the low bits off.
"""

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle, _get_np_dtype

ARITHMETIC = (
    "fadd", "fsub", "fmul", "fdiv", "precise_divf", "approx_divf", "frem", "fneg", "fma", "clampf", "dot",
    "minimumf", "maximumf", "minnumf", "maxnumf",
)  # fmt: skip
"""exp, sqrt and their like refuse bfloat16 in every version."""
CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")
SHORT_CUTS = {ReduceOps: ("min_max", "sum"), ScanOps: ("cumsum", "cumprod")}


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest, ties to even; any NaN becomes the quiet one that torch writes."""
    word = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def is_bf16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def promote(x: Any) -> Any:
    return TensorHandle(to_float32(x.data), tl.float32) if is_bf16(x) else x


def on_float32(method: Any) -> Any:
    """A builder method whose result has the type of its last operand, or is a bool."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        result = method(self, *map(promote, args), **kwargs)
        last = [arg for arg in args if isinstance(arg, TensorHandle)][-1]
        if is_bf16(last) and result.data.dtype != np.bool_:
            return TensorHandle(to_bits(result.data), tl.bfloat16)
        return result

    return wrapped


def cast_between(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(self, source, to):
        if is_bf16(source) or to.scalar == tl.bfloat16:
            data = promote(source).data.astype(np.float32)
            data = to_bits(data) if to.scalar == tl.bfloat16 else data.astype(_get_np_dtype(to))
            return TensorHandle(data, to.scalar)
        return method(self, source, to)

    return wrapped


def as_dtype(x: Any, dtype: tl.dtype) -> Any:
    """Tensors of float32 or bfloat16 with that of the two; others, such as indices, as they are."""
    if isinstance(x, (tuple, list)):
        return type(x)(as_dtype(each, dtype) for each in x)
    if x.dtype not in (tl.float32, tl.bfloat16):
        return x
    data = promote(x.handle).data
    data = to_bits(data) if dtype == tl.bfloat16 else data
    kind = tl.block_type(dtype, list(x.shape)) if x.type.is_block() else dtype
    return tl.tensor(TensorHandle(data, dtype), kind)


def reduce_float32(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(self, x, *args, **kwargs):
        if (x[0] if isinstance(x, tuple) else x).dtype != tl.bfloat16:
            return method(self, x, *args, **kwargs)
        return as_dtype(method(self, as_dtype(x, tl.float32), *args, **kwargs), tl.bfloat16)

    return wrapped


def index_by_arrays(patch: Any) -> Any:
    """Triton 3.6 makes an index, such as a bound of a loop, of a one-element array, which numpy 2.4 refuses."""

    @functools.wraps(patch)
    def wrapped(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return wrapped


def install() -> None:
    """Patch the interpreter, once per process. Versions differ in which methods they have."""
    if getattr(InterpreterBuilder, "computes_bf16", False):
        return
    compares = [name for name in dir(InterpreterBuilder) if name.startswith("create_fcmp")]
    for name in [*(f"create_{name}" for name in ARITHMETIC), *compares]:
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, on_float32(getattr(InterpreterBuilder, name)))
    for name in CASTS:
        setattr(InterpreterBuilder, f"create_{name}", cast_between(getattr(InterpreterBuilder, f"create_{name}")))
    for owner, names in SHORT_CUTS.items():
        for name in names:
            setattr(owner, name, reduce_float32(getattr(owner, name)))
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        to_bits(np.array([value], dtype=np.float32)), tl.bfloat16
    )
    interpreter._patch_lang_tensor = index_by_arrays(interpreter._patch_lang_tensor)
    InterpreterBuilder.computes_bf16 = True
