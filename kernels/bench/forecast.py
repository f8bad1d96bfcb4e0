"""The tables of predictions: every operation with its launches, the sweep over tokens, and the model's own record."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kernels.bench.constants import CALIBRATION, Gpu
from kernels.bench.distributions import DISTRIBUTIONS
from kernels.bench.model import Kernel
from kernels.bench.predict import BY_LOADS, OPERATIONS, predict, published
from kernels.bench.run import SWEEP, bytes_text, cliff_sentence, duration, flops_text, table
from kernels.bench.shapes import Shape

SHOWN = 0.02
"""Share of an operation's time from which a launch has a line of its own."""

HEADER = ("", "time", "FLOP/s", "of peak", "bytes/s", "of peak", "bound", "tiles")


def row(gpu: Gpu, name: str, kernel: Kernel) -> tuple[str, ...]:
    flops, nbytes = kernel.flops / kernel.seconds, kernel.bytes / kernel.seconds
    return (
        name, duration(kernel.seconds), *((flops_text(flops), f"{flops / gpu.peak_flops:.1%}") if flops else ("", "")),
        bytes_text(nbytes), f"{nbytes / gpu.bandwidth:.1%}", kernel.bound, kernel.note,
    )  # fmt: skip


def entry(gpu: Gpu, op: str, shape: Shape, kernel: Kernel, launches: Sequence[Kernel]) -> dict[str, Any]:
    return {
        "gpu": gpu.name, "op": op, "shape": dataclasses.asdict(shape), "seconds": kernel.seconds,
        "flops_per_s": kernel.flops / kernel.seconds, "bytes_per_s": kernel.bytes / kernel.seconds,
        "of_peak_flops": kernel.flops / kernel.seconds / gpu.peak_flops,
        "of_peak_bandwidth": kernel.bytes / kernel.seconds / gpu.bandwidth, "bound": kernel.bound,
        "launches": [launch._asdict() for launch in launches],
    }  # fmt: skip


def report(
    gpus: Sequence[Gpu], ops: Sequence[str], shapes: Sequence[Shape], distribution: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Say the predictions, for one distribution of the experts' loads or for all, and return them."""
    found = []
    for gpu in gpus:
        for shape in shapes:
            say(f"{gpu.name}, {sizes(shape)}")
            lines = []
            for op in (op for op in ops if op != "sweep"):
                several = op in BY_LOADS and distribution is None
                for name in DISTRIBUTIONS if several else (shape.distribution,):
                    here = shape.replace(distribution=name)
                    launches, whole = OPERATIONS[op](gpu, here), predict(gpu, op, here)
                    long = [launch for launch in launches if launch.seconds > SHOWN * whole.seconds]
                    whole = whole._replace(note=long[0].note if len(long) == 1 else "")
                    lines.append(row(gpu, f"{op}, {name}" if op in BY_LOADS else op, whole))
                    # The launches of training are those of the two operations before it.
                    if len(long) > 1 and op != "expert_mlp_training":
                        lines += [row(gpu, f"    {launch.name}", launch) for launch in long]
                    found.append(entry(gpu, op, here, whole, launches))
            if lines:
                say(table(HEADER, lines, left=(0, 7)) + "\n")
            if "sweep" in ops:
                found += say_sweep(gpu, shape, say)
    return {"predictions": found, "published": say_published(say)}


def sizes(shape: Shape) -> str:
    return (
        f"{shape.name}: {shape.tokens} tokens, top {shape.top_k} of {shape.experts} experts, {shape.hidden} x "
        f"{shape.intermediate}; {shape.batch} sequences of {shape.context}, {shape.heads} heads of {shape.head_dim} on "
        f"{shape.kv_heads}, {shape.queries} new; bfloat16"
    )


def say_sweep(gpu: Gpu, shape: Shape, say: Callable[[str], None]) -> list[dict[str, Any]]:
    whole = {tokens: predict(gpu, "expert_mlp", shape.replace(tokens=tokens)) for tokens in SWEEP}
    lines = [
        (str(tokens), duration(k.seconds), f"{tokens / k.seconds:,.0f}", flops_text(k.flops / k.seconds),
         bytes_text(k.bytes / k.seconds), f"{k.bytes / k.seconds / gpu.bandwidth:.1%}", k.bound)
        for tokens, k in whole.items()
    ]  # fmt: skip
    say(f"expert_mlp by tokens, {gpu.name}, {shape.name}, loads {shape.distribution}")
    say(table(("tokens", "time", "tokens/s", "FLOP/s", "bytes/s", "of peak", "bound"), lines))
    say(cliff_sentence(gpu.name, [(tokens, k.seconds) for tokens, k in whole.items()]) + "\n")
    return [entry(gpu, "sweep", shape.replace(tokens=tokens), k, ()) for tokens, k in whole.items()]


def say_published(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What others measured beside the model: how far to trust it."""
    pairs = published()
    lines = [
        (p.what, p.gpu, f"{p.value:.0f} {p.unit}", f"{value:.0f} {p.unit}", f"{value / p.value - 1:+.0%}",
         "fitted to" if p in CALIBRATION else "not fitted to")
        for p, value in pairs
    ]  # fmt: skip
    say("The model beside what others measured, none of it on an A100; sources in kernels/bench/constants.py")
    say(table(("", "GPU", "published", "model", "", ""), lines))
    return [p._asdict() | {"model": value} for p, value in pairs]
