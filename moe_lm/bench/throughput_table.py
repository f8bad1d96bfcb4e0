"""The benchmark of generation as lines of text, each said as soon as it is measured: so widths are fixed."""

from collections.abc import Callable
from typing import NamedTuple

from moe_lm.bench.throughput import Record


class Column(NamedTuple):
    name: str
    width: int
    """To the left where negative."""
    entry: Callable[[Record], str]

    def cell(self, text: str) -> str:
        return text.ljust(-self.width) if self.width < 0 else text.rjust(self.width)


def rate(key: str) -> Callable[[Record], str]:
    """Tokens per second, or nothing where they were not measured."""
    return lambda line: "" if line.get(key) is None else f"{line[key]:,.0f}" if line[key] >= 100 else f"{line[key]:.1f}"


def share(key: str) -> Callable[[Record], str]:
    return lambda line: "" if line.get(key) is None else f"{line[key]:.0%}"


def times(key: str) -> Callable[[Record], str]:
    return lambda line: "" if line.get(key) is None else f"{line[key]:.2f}x"


def spread(line: Record) -> str:
    """How far the quartiles lie from the median."""
    low, high = line["spread"]
    return f"{low:+.0%} {high:+.0%}"


OURS = (
    Column("case", -16, lambda line: line["name"]),
    Column("batch", 5, lambda line: str(line["batch"])),
    Column("tokens/s", 9, rate("tokens_per_s")),
    Column("quartiles", 10, spread),
    Column("limit", 9, rate("limit")),
    Column("of limit", 8, share("fraction")),
    Column("overhead", 8, share("overhead")),
)
SPECULATION = (
    Column("of plain", 8, times("ratio_to_plain")),
    Column("accepted", 8, share("acceptance")),
    Column("per step", 8, lambda line: "" if line.get("tokens_per_step") is None else f"{line['tokens_per_step']:.2f}"),
)
PEER = (
    Column("default", 9, rate("peer_default")),
    Column("ratio", 6, times("ratio_to_default")),
    Column("fastest", 9, rate("peer")),
    Column("ratio", 6, times("ratio")),
    Column("its setting", -12, lambda line: line.get("peer_setting", "")),
)

LIMIT = """\
tokens/s: medians; of the prompt for prefill, new ones for decode (after each request's first) and trace (in all)
limit: for decode, weights of a step over read bandwidth, each expert that was chosen once, without keys and values;
for prefill, FLOPs over the matrix rate; for the trace both in turn, with the experts expected of uniform choices
overhead: scheduler's and sampler's share of the steps' time"""
SPEEDUP = (
    "of plain: beside the same without speculation; speculation gets several tokens from a step, and may pass the limit"
)
PEERS = "default, fastest: {name} {version}, each with ours as a multiple of it"


def columns(speculation: bool, peer: bool) -> tuple[Column, ...]:
    return OURS + (SPECULATION if speculation else ()) + (PEER if peer else ())


def header(shown: tuple[Column, ...]) -> str:
    return "  ".join(column.cell(column.name) for column in shown).rstrip()


def row(shown: tuple[Column, ...], line: Record) -> str:
    return "  ".join(column.cell(column.entry(line)) for column in shown).rstrip()


def legend(speculation: bool, peer: tuple[str, str] | None) -> str:
    """What the columns mean; `peer` is its name and version."""
    lines = [LIMIT, SPEEDUP if speculation else "", PEERS.format(name=peer[0], version=peer[1]) if peer else ""]
    return "\n".join(filter(None, lines))
