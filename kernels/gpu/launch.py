"""Where kernels are launched, and what a launch may know of the machine.

Every launch goes through `launch`, so that `recording` sees exactly what a GPU would be asked to run: the static gate
compiles what the operations record on meta tensors, with the specialisations that Triton itself derives from them.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Target(NamedTuple):
    """What tile choices depend on."""

    arch: int
    """Compute capability as one number: 80 for A100, 90 for H100."""
    sms: int
    """Streaming multiprocessors."""

    @property
    def has_tma(self) -> bool:
        """Whether tiles can be copied by the tensor memory accelerator."""
        return self.arch >= 90


A100, H100 = Target(80, 108), Target(90, 132)


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    """The function under @triton.jit."""
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    """Its keyword arguments: constexprs, num_warps, num_stages."""


_assumed: Target | None = None
_record: list[Launch] | None = None


def target(device: torch.device) -> Target:
    """The GPU of a tensor's device; what `assume` says inside it, and an A100 where there is no GPU."""
    if _assumed is not None:
        return _assumed
    return _properties(device) if device.type == "cuda" and torch.cuda.is_available() else A100


@cache
def _properties(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


@contextlib.contextmanager
def assume(gpu: Target) -> Iterator[None]:
    """Choose tiles and code paths for `gpu` while inside, whatever the machine is."""
    global _assumed
    before, _assumed = _assumed, gpu
    try:
        yield
    finally:
        _assumed = before


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running them while inside."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` on `grid` on the device of its first tensor argument. An empty grid runs nothing."""
    if _record is not None:
        _record.append(Launch(kernel, grid, args, meta))
    elif all(grid):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **meta)


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A host-side TMA descriptor of x, read in tiles of `block`; what a tile reads outside x is 0."""
    return TensorDescriptor.from_tensor(x, block)


def aligned(*tensors: Tensor) -> bool:
    """Whether TMA can read all of these: 16-byte starts and row strides, a contiguous last axis, nothing empty."""
    return all(
        x.numel() > 0
        and x.stride(-1) == 1
        and (x.storage_offset() * x.itemsize) % 16 == 0
        and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )
