"""Triton's interpreter without two things that it does again and again, a third or more of its time: at each call of a
function inside a kernel it looks through triton.language for something to patch, which the launch has done already, and
each time that it needs a numpy type it makes a table of all (3.6, 3.7.1 and 3.9)."""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


def remembering(find: Any) -> Any:
    """`find` of a type's name, for types that their name says all of."""
    known: dict[str, Any] = {}

    def wrapped(kind):
        if type(kind) is not tl.dtype:
            return find(kind)
        if kind.name not in known:
            known[kind.name] = find(kind)
        return known[kind.name]

    return wrapped


def languages(function: InterpretedFunction) -> list[Any]:
    """What _patch_lang patches for a function: the modules that it knows triton.language by."""
    return [module for module in (tl, tl.core) if any(each is module for each in function.fn.__globals__.values())]


def call_inside(self, *args, **kwargs):
    if not hasattr(self, "languages"):
        self.languages = languages(self)
    if any(tl.core.is_builtin(module.load) for module in self.languages):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Once per process."""
    if InterpretedFunction.__call__ is not call_inside:
        InterpretedFunction.__call__ = call_inside
        interpreter._get_np_dtype = remembering(interpreter._get_np_dtype)
