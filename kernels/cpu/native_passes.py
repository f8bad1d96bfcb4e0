"""The passes of training between matrix products, each one call of a C++ library (native/training.cpp).

N tokens, K experts per token, D hidden width, F expert width, V vocabulary, M rows that experts compute, B rows of T
tokens, I queries in a block, J keys it can see, H query heads, R of them share a key head, C channels of a head.
Tensors are float32 or bfloat16, computed in float32, rounded once.
"""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu import FLOAT_DTYPES
from kernels.cpu.native import BuildError, build

FUNCTIONS = {
    "cross_entropy": "pp iii", "swiglu": "pp ii", "swiglu_backward": "pppppp ii", "gather": "ppp ii",
    "combine": "pppp iii", "rms_norm": "pppppp iid", "rms_norm_backward": "ppppppp ii", "rope": "pippp iii",
    "softmax": "pp d p", "softmax_backward": "pppp d p", "row_products": "ppp ii", "route": "pppppp iiii",
    "gate": "ppp iii", "gate_backward": "ppppp iii", "router_statistics": "ppppp iii",
    "router_statistics_backward": "ppp d iii",
}  # fmt: skip
"""Arguments of each function between the dtype and the number of threads: pointers, integers, doubles."""
TYPES = {"p": c_void_p, "i": c_int64, "d": c_double}
GRAIN = 1 << 14
"""Numbers for which another thread is worth its start."""


class BlockArgs(ctypes.Structure):
    """`Block` of training.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "I", "R", "J", "first")),
        ("documents", c_void_p),
        ("T", c_int64),
    ]


@functools.cache
def library(generic: bool = False) -> ctypes.CDLL:
    """The compiled library; `generic` as in kernels.cpu.decoder. Raises BuildError if it cannot be compiled."""
    loaded = ctypes.CDLL(str(build("training", ("-DMOE_LM_GENERIC",) if generic else ())))
    for name, arguments in FUNCTIONS.items():
        function = getattr(loaded, f"moe_lm_{name}")
        function.argtypes = [c_int64, *(TYPES[each] for each in arguments if each != " "), c_int64]
        function.restype = c_double if name == "cross_entropy" else None
    loaded.moe_lm_place.argtypes = [c_void_p] * 3 + [c_int64] * 5 + [c_void_p] * 3
    loaded.moe_lm_place.restype = c_int64
    return loaded


@functools.cache
def unavailable() -> str | None:
    """Why there is no library, in a sentence; None if there is. May compile it."""
    try:
        library()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def call(name: str, like: Tensor, *arguments: Tensor | float | ctypes.Structure | None) -> float | None:
    """Run a function on numbers of the dtype of `like`, with as many threads as its size is worth."""
    assert like.dtype in FLOAT_DTYPES, like.dtype
    given = []
    for each in arguments:
        if isinstance(each, Tensor):
            assert each.is_contiguous(), (name, each.shape, each.stride())
            each = each.data_ptr()
        elif isinstance(each, ctypes.Structure):
            each = ctypes.addressof(each)
        given.append(each)
    threads = max(1, min(torch.get_num_threads(), like.numel() // GRAIN))
    return getattr(library(), f"moe_lm_{name}")(like.dtype == torch.bfloat16, *given, threads)


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> float:
    """Sum of -log softmax(logits)[target] over the rows of (N, V) whose target (N,) is not negative.

    With `gradient` the logits become its gradient, 0 in the other rows, whatever they held.
    """
    return call("cross_entropy", logits, logits, targets.contiguous(), *logits.shape, gradient)


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate) * up: (..., 2F), gate channels first, to (..., F)."""
    F = hidden.shape[-1] // 2
    act = hidden.new_empty(*hidden.shape[:-1], F)
    call("swiglu", act, hidden, act, act.numel() // F, F)
    return act


def swiglu_backward(
    grad_act: Tensor, hidden: Tensor, weights: Tensor | None = None, slots: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden (M, 2F), and of weights (N, K) float32 by which the row of slot s, slots (M,), counts.

    grad_act (M, F) is that of one unweighted row, and becomes weight * act. Rows without a slot, -1, get zeros. Without
    weights every row counts once.
    """
    F = grad_act.shape[-1]
    grad_hidden = torch.empty_like(hidden)
    grad_weights = None if weights is None else torch.empty_like(weights)
    call("swiglu_backward", grad_act, grad_act, hidden, weights, slots, grad_hidden, grad_weights,
         grad_act.numel() // F, F)  # fmt: skip
    return grad_hidden, grad_weights


def route(logits: Tensor, top_k: int, bias: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What kernels.route gives of logits (N, E) and bias (E,) in float32: weights, experts, order and offsets."""
    N, E = logits.shape
    weights, experts = logits.new_empty(N, top_k), torch.empty(N, top_k, dtype=torch.int64)
    order, offsets = experts.new_empty(N * top_k), experts.new_empty(E + 1)
    given = None if bias is None else bias.contiguous()
    call("route", logits, logits.contiguous(), given, weights, experts, order, offsets, N, E, top_k, normalize)
    return weights, experts, order, offsets


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, E) float32 of tokens x (N, D) and a router's weight (E, D) float32, summed in float32."""
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    call("gate", x, x.contiguous(), weight.contiguous(), logits, *x.shape, len(weight))
    return logits


def gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, D) and weight (E, D) from that of the logits (N, E)."""
    grad_x, grad_weight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(weight.shape)
    call("gate_backward", x, grad.contiguous(), x.contiguous(), weight.contiguous(), grad_x, grad_weight, *x.shape,
         len(weight))  # fmt: skip
    return grad_x, grad_weight


def router_statistics(logits: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What kernels.router_statistics gives of logits (N, E) float32."""
    N, E = logits.shape
    found = logits.new_empty(rows, E), *[logits.new_empty(()) for _ in range(3)]
    call("router_statistics", logits, logits.contiguous(), *found, N, E, rows)
    return found


def router_statistics_backward(logits: Tensor, grad_probability: Tensor, grad_z: Tensor) -> Tensor:
    """Gradient of the logits (N, E), from those of the mean probabilities (rows, E) and of the z-loss, a scalar."""
    rows, E = grad_probability.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    call("router_statistics_backward", logits, logits.contiguous(), grad_probability.contiguous(), grad, grad_z.item(),
         len(logits), E, rows)  # fmt: skip
    return grad


def place(
    order: Tensor, offsets: Tensor, starts: list[int], shape: torch.Size, size: int, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token and slot of each of `total` rows, int64, -1 where it is spare, and the row of every slot, int64 (N, K).

    The slots of expert e, offsets[e] .. offsets[e + 1] of order (N * K,), have rows e * size .., those beyond the first
    `size` of them starts[e] + size ... Raises IndexError for slots that are not there.
    """
    tokens, slots = torch.empty(2, total, dtype=torch.int64)
    row_of_slot = torch.empty(shape, dtype=torch.int64)
    given = [x.contiguous() for x in (order, offsets, torch.tensor(starts))]
    good = library().moe_lm_place(
        *[x.data_ptr() for x in given], len(order), len(starts), shape[1], size, total,
        *[x.data_ptr() for x in (tokens, slots, row_of_slot)],
    )  # fmt: skip
    if not good:
        raise IndexError(f"order and offsets are not the {len(order)} slots of a routing.")
    return tokens, slots, row_of_slot


def gather(x: Tensor, sources: Tensor) -> Tensor:
    """Rows `sources` (M,) of x (N, D), zeros for -1."""
    out = x.new_empty(len(sources), x.shape[1])
    call("gather", out, x.contiguous(), sources, out, *out.shape)
    return out


def combine(y: Tensor, weights: Tensor | None, row_of_slot: Tensor) -> Tensor:
    """Sums of rows of y (M, D), row_of_slot (N, K) of them for each token, by weights (N, K) float32, or once each."""
    out = y.new_empty(len(row_of_slot), y.shape[1])
    call("combine", out, y, weights, row_of_slot, out, *row_of_slot.shape, y.shape[1])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + residual (..., D), that sum, and its inverse root mean squares, float32 (..., 1)."""
    x = x.contiguous()
    out, D = torch.empty_like(x), x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    call("rms_norm", x, x, None if residual is None else residual.contiguous(), weight.float().contiguous(), total, out,
         inverse, inverse.numel(), D, eps)  # fmt: skip
    return out, total, inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D), with grad_sum added, and of weight (D,)."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.empty(x.shape[-1], dtype=torch.float32)
    others = None if grad_sum is None else grad_sum.contiguous()
    call("rms_norm_backward", x, grad.contiguous(), x.contiguous(), weight.float().contiguous(), inverse, others,
         grad_x, grad_weight, inverse.numel(), x.shape[-1])  # fmt: skip
    return grad_x, grad_weight.to(weight.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, H, C) turned by its angles, cos and sin (N, C / 2) float32."""
    N, H, C = x.shape
    if x.stride()[1:] != (C, 1):
        x = x.contiguous()
    out = x.new_empty(N, H, C)
    call("rope", out, x.data_ptr(), x.stride(0), cos.contiguous(), sin.contiguous(), out, N, H, C)
    return out


def softmax(scores: Tensor, lse: Tensor, scale: float, first: int, documents: Tensor | None) -> None:
    """Make probabilities of scale * scores, the products of a block of queries with keys, and note their log-sum-exp.

    scores (B, I * R, J), those of query first + i and head r in row i * R + r; lse (B, T, R) float32. A query sees the
    keys up to its own place in the row of T, and of its document only, documents (B, T) int64.
    """
    call("softmax", scores, scores, lse, scale, block(scores, lse, first, documents))


def softmax_backward(
    scores: Tensor, grad_p: Tensor, lse: Tensor, delta: Tensor, scale: float, first: int, documents: Tensor | None
) -> None:
    """Make probabilities of scores again, and of grad_p, their gradient, that of the scores; the rest as in `softmax`.

    delta (B, T, R) float32 holds the sums of probabilities times their gradients.
    """
    call("softmax_backward", scores, scores, grad_p, lse, delta, scale, block(scores, lse, first, documents))


def block(scores: Tensor, lse: Tensor, first: int, documents: Tensor | None) -> BlockArgs:
    """`documents` is contiguous, and lives longer than what is returned."""
    B, queries, J = scores.shape
    T, R = lse.shape[1:]
    assert documents is None or documents.is_contiguous()
    return BlockArgs(B, queries // R, R, J, first, None if documents is None else documents.data_ptr(), T)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b over the last axis, float32."""
    out = a.new_empty(a.shape[:-1], dtype=torch.float32)
    call("row_products", a, a.contiguous(), b.contiguous(), out, out.numel(), a.shape[-1])
    return out
