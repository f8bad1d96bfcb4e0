"""Which backend runs an operation, and why.

A backend is a package of modules, one per operation, each with a function of the operation's name. A fast package says
on which devices it does not run, `unavailable(device) -> str | None`, and a fast module what it cannot take,
`unsupported(*args) -> str | None`. The choice is made from the arguments, never by trying: the first backend of the
device's list that supports them runs, and a fall to the plain reference is said once.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"), "cuda": ("gpu", "reference"), "meta": ("reference",)
}  # fmt: skip
"""Backends that are tried on each device type, fastest first."""

_forced: str | None = None
"""What `use_backend` asks for: one for the process, since on a GPU autograd's backward runs in a thread of its own."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation of the process with one backend while inside; one that it cannot run raises ValueError."""
    global _forced
    known = sorted({backend for names in BACKENDS.values() for backend in names})
    if name not in known:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(known)}.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


_modules: dict[str, ModuleType] = {}


def module(backend: str, op: str) -> ModuleType:
    return _import(f"{backend}.{op}")


def _import(name: str) -> ModuleType:
    # A dict, not functools.cache, into which torch.compile does not trace.
    if name not in _modules:
        _modules[name] = importlib.import_module(f"kernels.{name}")
    return _modules[name]


def device_of(args: tuple[Any, ...]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, torch.Tensor))


def reason_against(backend: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot run `op` on these arguments; None if it can."""
    if backend == "reference":
        return None
    return _import(backend).unavailable(device_of(args)) or module(backend, op).unsupported(*args)


def select(op: str, args: tuple[Any, ...]) -> str:
    """Name of the backend that runs `op(*args)`. Raises ValueError when the one that was asked for cannot."""
    if _forced is not None:
        reason = reason_against(_forced, op, args)
        if reason:
            raise ValueError(f"{op}: the backend {_forced!r} that use_backend asks for cannot run: it {reason}.")
        return _forced
    reasons = []
    for backend in BACKENDS.get(device_of(args).type, ("reference",)):
        if backend == "reference":
            if reasons:
                _warn_once(f"{op} runs on its plain reference: " + "; ".join(reasons) + ".")
            return backend
        reason = reason_against(backend, op, args)
        if reason is None:
            return backend
        reasons.append(f"{backend} {reason}")
    raise AssertionError("the reference supports everything")


def is_fast(op: str, args: tuple[Any, ...]) -> bool:
    """Whether the fast backend of the device, or the one that `use_backend` asks for, takes these arguments."""
    names = BACKENDS.get(device_of(args).type, ()) if _forced is None else (_forced,)
    return any(name != "reference" and reason_against(name, op, args) is None for name in names)


def explain(op: str, args: tuple[Any, ...]) -> dict[str, str]:
    """Every known backend with `chosen`, `available` or the reason against it, for `op(*args)`."""
    chosen = select(op, args)
    names = dict.fromkeys(backend for names in BACKENDS.values() for backend in names)
    return {
        name: "chosen" if name == chosen else reason_against(name, op, args) or "available" for name in names
    }  # fmt: skip


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def needs_custom_op(args: tuple[Any, ...]) -> bool:
    """Whether autograd, a compiler or a fake tensor must see the operation as one opaque node.

    Plain inference goes straight to the backend and spares the Python of a custom op, of which a token takes dozens.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.is_inference_mode_enabled() and type(args[0]) is torch.Tensor:
        return False
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter) for tensor in tensors)


def call(op: str, *args: Any) -> Any:
    """Run `op` on the selected backend; through its custom op where something must look at it."""
    backend = select(op, args)
    implementation = module(backend, op)
    # Plain torch: autograd, compilers and fake tensors see through it.
    plain = backend == "reference" or getattr(implementation, "PLAIN", False)
    if plain or not needs_custom_op(args):
        return getattr(implementation, op)(*args)
    from kernels import autograd

    return getattr(autograd, op)(*args)
