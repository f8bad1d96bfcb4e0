"""Libraries of products of pairs (native/pairs.h) and whether they are the fastest here: on AVX512-BF16 without AMX."""

import ctypes
import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.native import BuildError, build
from kernels.cpu.native_passes import GRAIN

WIDTH = 16
"""Widths of products are multiples of this."""


@functools.cache
def load(name: str, generic: bool = False) -> ctypes.CDLL:
    """The compiled library `name`; `generic` as in kernels.cpu.decoder. Raises BuildError if it cannot be compiled."""
    loaded = ctypes.CDLL(str(build(name, ("-DMOE_LM_GENERIC",) if generic else ())))
    loaded.moe_lm_fastest.restype = c_int64
    return loaded


@functools.cache
def fastest() -> bool:
    """Whether they are faster than oneDNN's products on this machine; not without a compiler. May compile one."""
    try:
        return bool(load("experts").moe_lm_fastest())
    except (BuildError, OSError):
        return False


def run(name: str, function: str, shape: ctypes.Structure, *tensors: Tensor) -> bool:
    """Call moe_lm_`function` of a library with the addresses of contiguous tensors; whether it could do it."""
    for tensor in tensors:
        assert tensor.is_contiguous(), (name, function, tensor.shape, tensor.stride())
    call = getattr(load(name), f"moe_lm_{function}")
    call.argtypes, call.restype = [c_void_p] * (1 + len(tensors)), c_int64
    return bool(call(ctypes.addressof(shape), *[tensor.data_ptr() for tensor in tensors]))


def threads(work: int) -> int:
    """How many are worth it for as many numbers."""
    return max(1, min(torch.get_num_threads(), work // GRAIN))
