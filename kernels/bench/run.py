"""The benchmark: for each operation and shape, contenders checked, timed and set against what the device can do."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kernels import registry
from kernels.bench.cost import cost
from kernels.bench.measure import TOLERANCE, Machine, Times, alternate, errors
from kernels.bench.ops import BUILDERS, Case, build
from kernels.bench.shapes import Shape

SWEEP = (1, 2, 4, 8, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Token counts of the sweep, with both sides of every count where kernels.tiles changes the tile of a decode step."""

SWEEP_TURNS = 3

CLIFF = 0.25
"""Share of tokens per second that more tokens may cost before it is called a cliff."""

OPERATIONS = (*BUILDERS, "sweep")
"""Names for the command line; `sweep` is expert_mlp from 1 to 4,096 tokens."""

Record = dict[str, Any]
"""One measurement, as it goes into the JSON file."""


class WrongResult(Exception):
    """A contender's result is not the reference's."""


def our_backends(device: torch.device) -> list[str]:
    """The fast backends of a device."""
    return [name for name in registry.BACKENDS[device.type] if name != "reference"]


def checked(case: Case, op: str, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Every rival's error. Raises WrongResult if one of them is not the reference's result."""
    found = errors(case)
    for name, error in found.items():
        if not error <= TOLERANCE[dtype]:
            raise WrongResult(
                f"{op} on {shape.name}: {name} is wrong by {error:.1e} of the largest value, more than the "
                f"{TOLERANCE[dtype]:.0e} that {str(dtype).removeprefix('torch.')} may."
            )
    return found


def measure(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, backends: list[str], seconds: float,
    quick: bool = False,
) -> list[Record]:  # fmt: skip
    """Records of all contenders of one operation, ours first.

    Raises WrongResult if one of them is not the reference's result, ValueError if no backend of ours can run it.
    """
    case = build(op, shape, device, dtype, backends)
    wrong = checked(case, op, shape, dtype)
    samples = alternate({name: c.run for name, c in case.contenders.items()}, device, seconds, quick)
    return [
        record(op, shape, dtype, name, samples[name], ours=name in backends, rival=c.rival, error=wrong.get(name))
        for name, c in case.contenders.items()
    ]


def record(
    op: str, shape: Shape, dtype: torch.dtype, contender: str, samples: dict[str, list[float]], **facts: Any
) -> Record:
    flops, nbytes = cost(op, shape, dtype.itemsize)
    times = {kind: Times.of(seconds) for kind, seconds in samples.items()}
    rates = {
        kind: {"flops_per_s": flops / t.median, "bytes_per_s": nbytes / t.median} for kind, t in times.items()
    }  # fmt: skip
    return {
        "op": op, "shape": dataclasses.asdict(shape), "dtype": str(dtype).removeprefix("torch."),
        "contender": contender, **facts, "flops": flops, "bytes": nbytes,
        **{kind: t._asdict() | rates[kind] for kind, t in times.items()},
    }  # fmt: skip


def sweep(
    shape: Shape, device: torch.device, dtype: torch.dtype, backends: list[str], seconds: float, quick: bool = False,
    counts: Iterable[int] = SWEEP,
) -> list[Record]:  # fmt: skip
    """Records of expert_mlp at every count of tokens, ours and a loop over experts, with `seconds` for each.

    The counts are gone through several times, so that a busy minute of the machine does not look like a cliff.
    """
    turns = 1 if quick else SWEEP_TURNS
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    wrong: dict[tuple[int, str], float] = {}
    for turn in range(turns):
        for tokens in counts:
            here = shape.replace(tokens=tokens)
            case = build("expert_mlp", here, device, dtype, backends)
            if turn == 0:
                wrong |= {(tokens, name): error for name, error in checked(case, "sweep", here, dtype).items()}
            runs = {name: c.run for name, c in case.contenders.items() if name in (*backends, "loop")}
            for name, kinds in alternate(runs, device, seconds / turns, quick).items():
                kept = found.setdefault((tokens, name), {kind: [] for kind in kinds})
                for kind, samples in kinds.items():
                    kept[kind] += samples
    return [
        record(
            "expert_mlp", shape.replace(tokens=tokens), dtype, name, samples, ours=name in backends, rival=True,
            error=wrong[tokens, name],
        ) | {"op": "sweep"}
        for (tokens, name), samples in found.items()
    ]  # fmt: skip


def worst_fall(points: Iterable[tuple[int, float]]) -> tuple[float, int, int]:
    """The largest share of tokens per second that is lost between a count of tokens and a larger one, and these two.

    `points` are counts of tokens, growing, and seconds.
    """
    best, best_tokens, worst = 0.0, 0, (0.0, 0, 0)
    for tokens, seconds in points:
        speed = tokens / seconds
        if speed >= best:
            best, best_tokens = speed, tokens
        elif 1 - speed / best > worst[0]:
            worst = (1 - speed / best, best_tokens, tokens)
    return worst


def cliff_sentence(what: str, points: Iterable[tuple[int, float]]) -> str:
    fall, before, after = worst_fall(points)
    if fall == 0:
        return f"{what}: no cliff; every larger count of tokens does more tokens per second."
    verdict = f"A CLIFF, of more than {CLIFF:.0%}" if fall > CLIFF else "no cliff"
    return f"{what}: {verdict}; at worst {fall:.0%} fewer tokens per second at {after} tokens than at {before}."


def flops_text(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s" if value >= 1e13 else f"{value / 1e9:.{0 if value >= 1e10 else 1}f} GFLOP/s"


def bytes_text(value: float) -> str:
    return f"{value / 1e9:.{0 if value >= 1e11 else 1}f} GB/s"


def duration(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def spread(times: Record) -> str:
    """Median, and how far the quartiles lie from it."""
    low, high = (times[key] / times["median"] - 1 for key in ("low", "high"))
    return f"{duration(times['median'])} {low:+.0%} {high:+.0%}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their longest entry; those numbered in `left` to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    sides = [str.ljust if i in left else str.rjust for i in range(len(header))]
    return "\n".join(
        "  ".join(side(entry, w) for side, entry, w in zip(sides, line, widths, strict=True)).rstrip() for line in lines
    )


HEADER = ("", "error", "cold", "warm", "FLOP/s", "of GEMM", "bytes/s", "of copy")


def rows(records: Iterable[Record], machine: Machine) -> list[tuple[str, ...]]:
    """Lines of the table: rates are those of the cold call."""
    return [
        (
            ("* " if r["ours"] else "  ") + r["contender"] + ("" if r["rival"] else " (no rival)"),
            "" if r["error"] is None else f"{r['error']:.0e}",
            spread(r["cold"]), spread(r["warm"]),
            flops_text(r["cold"]["flops_per_s"]), f"{r['cold']['flops_per_s'] / machine.gemm:.0%}",
            bytes_text(r["cold"]["bytes_per_s"]), f"{r['cold']['bytes_per_s'] / machine.copy:.0%}",
        )
        for r in records
    ]  # fmt: skip


def sweep_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    return [
        (
            str(r["shape"]["tokens"]), r["contender"], spread(r["cold"]), spread(r["warm"]),
            f"{r['shape']['tokens'] / r['cold']['median']:,.0f}",
        )
        for r in records
    ]  # fmt: skip


def points(records: Iterable[Record], contender: str) -> list[tuple[int, float]]:
    """Tokens and seconds of one contender of a sweep: those of the fastest cold call, since what else a machine does
    only adds time, and a cliff is there in every call."""
    return [(r["shape"]["tokens"], r["cold"]["least"]) for r in records if r["contender"] == contender]


def benchmark(
    ops: Sequence[str], shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, backends: list[str],
    machine: Machine, seconds: float, quick: bool, say: Callable[[str], None],
) -> list[Record]:  # fmt: skip
    """All records, each operation's table said as soon as it is there."""
    found: list[Record] = []
    for shape in shapes:
        for op in ops:
            if op == "sweep":
                records = sweep(shape, device, dtype, backends, seconds / 4, quick)
                header = ("tokens", "contender", "cold", "warm", "tokens/s, cold")
                say(f"\nexpert_mlp by tokens, {shape.name}\n{table(header, sweep_rows(records), left=(1,))}")
                for name in dict.fromkeys(r["contender"] for r in records if r["ours"]):
                    say(cliff_sentence(name, points(records, name)))
            else:
                records = measure(op, shape, device, dtype, backends, seconds, quick)
                say(f"\n{table((f'{op}, {shape.name}', *HEADER[1:]), rows(records, machine))}")
            found += records
    return found
