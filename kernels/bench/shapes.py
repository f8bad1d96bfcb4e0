"""The sizes that operations are predicted and measured at: a few named ones, each field of which is an option."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from kernels.bench.distributions import DISTRIBUTIONS

KV_DTYPES = ("bfloat16", "int8")


def described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Shape:
    """One size of every operation."""

    name: str = "large"
    tokens: int = described(8192, "tokens of a batch")
    hidden: int = described(2048, "hidden width")
    intermediate: int = described(4096, "width of an expert")
    experts: int = described(16, "experts")
    top_k: int = described(2, "experts per token")
    distribution: str = described("uniform", f"how tokens choose experts: {', '.join(DISTRIBUTIONS)}")
    seed: int = described(0, "seed of the choices and the values")
    vocab: int = described(100352, "vocabulary of cross_entropy")
    sequence: int = described(2048, "tokens of a row of attention")
    heads: int = described(16, "query heads")
    kv_heads: int = described(1, "key-value heads")
    head_dim: int = described(128, "channels of a head")
    batch: int = described(16, "sequences of paged_attention")
    context: int = described(32768, "tokens of each of them")
    queries: int = described(1, "new tokens of each: 1 in decoding, more in verifying a draft")
    page: int = described(64, "tokens of a page")

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k is {self.top_k}, more than --experts {self.experts}.")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"--distribution is {self.distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads is {self.heads}, which --kv-heads {self.kv_heads} does not divide.")
        if self.queries > self.context:
            raise ValueError(f"--queries is {self.queries}, more than --context {self.context}.")

    def replace(self, **changes: Any) -> "Shape":
        return dataclasses.replace(self, **changes)

    @property
    def slots(self) -> int:
        return self.tokens * self.top_k


FIELDS = dataclasses.fields(Shape)[1:]
SIZES = [f.name for f in FIELDS if f.type is int and f.name != "seed"]

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(),
        Shape("mixtral", hidden=4096, intermediate=14336, experts=8, vocab=32000, heads=32, kv_heads=8),
        Shape("fine", intermediate=768, experts=128, top_k=8, vocab=151936, heads=32, kv_heads=4),
        Shape(
            "nano", tokens=2048, hidden=256, intermediate=128, vocab=4096, sequence=256, heads=4, head_dim=64,
            batch=8, context=1024,
        ),
    )
}  # fmt: skip
"""`large` holds the sizes of the speed targets, `mixtral` and `fine` those of Mixtral-8x7B and Qwen3-30B-A3B, `nano`
those of this repository's nano model."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field; what is not given keeps the named shape's value."""
    group = parser.add_argument_group("sizes (what is not given is that of the named shape)")
    for f in FIELDS:
        group.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f.metadata["help"], metavar="X")


def chosen(names: list[str], options: argparse.Namespace) -> list[Shape]:
    """The named shapes with the given options in place, and in the name. Raises ValueError for an unknown name."""
    changes = {f.name: getattr(options, f.name) for f in FIELDS if getattr(options, f.name) is not None}
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"shape {name!r} is unknown; choose among {', '.join(SHAPES)}.")
    given = "".join(f", {field} {value}" for field, value in changes.items())
    return [SHAPES[name].replace(name=f"{name}{given}", **changes) for name in names]
