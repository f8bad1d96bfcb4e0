"""moe-lm: a GPT-4-shaped mixture-of-experts language model, from a laptop to the full-size plan.

`moe_lm.load(path)` opens a trained model, `moe_lm.load_tokenizer(path)` its tokenizer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lm.checkpoint import load, load_tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    # On demand (PEP 562): the planner and every --help import this package without a second spent on torch.
    if name in ("load", "load_tokenizer"):
        from moe_lm import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
