"""How fast this machine trains a model, where a step's time goes, and Hugging Face transformers beside it.

    python -m moe_lm.bench train                          # configs/nano.toml
    python -m moe_lm.bench train --shape small --rows 32 --against transformers --json

Steps are those of the training loop, on random tokens with random weights, every row one document. MFU is the step's
FLOPs (forward and twice that for the backward, nothing that is computed again) over the rate of the machine's matrix
products in the same dtype. Transformers gets the same weights and tokens, its own loss (cross-entropy and router loss),
the same clipping and fused AdamW, and of its ways to compute experts and to keep float32 weights the fastest. Ours,
theirs and the machine take turns, so that other work slows all alike: figures are medians over the turns, with their
range. Parts are means over further steps, one a turn, with a clock in them (moe_lm.bench.train_parts says how). With
--json all figures are one line of JSON.
"""

import importlib.util
import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kernels.bench.measure import busy
from kernels.cpu.process import tune_process
from moe_lm.bench import machine
from moe_lm.bench.train_parts import DIRECTIONS, PARTS, StepParts, table
from moe_lm.bench.train_step import TrainingStep
from moe_lm.bench.workload import SHAPES
from moe_lm.cli import Parser, parse_run_config, run_main
from moe_lm.config import RunConfig, require
from moe_lm.model.device import choose_device
from moe_lm.scaling.counts import parameters, train_flops_per_token
from moe_lm.train.memory import check_memory

REPLACED = {
    "data.sequence_length": "--length", "train.batch_tokens": "--rows", "train.micro_batch_tokens": "--rows",
    "train.batch_tokens_start": "--rows", "train.batch_ramp_steps": "--rows", "train.optimizer": "--optimizer",
}  # fmt: skip
"""Settings of the config that options of the benchmark stand for."""


def main(argv: list[str]) -> None:
    run, args = parse_run_config(argv, __doc__, extra=add_options)
    run = benchmark_config(run, args, argv)
    check_memory(run)
    device = choose_device(run.train.device)
    other_work = busy() if device.type == "cpu" else None
    if device.type == "cpu":
        tune_process()
    found = measure(run, args)
    found["machine"]["other_work"] = other_work
    print(json.dumps(found, allow_nan=False) if args.json else "\n".join(lines(found)))


def add_options(parser: Parser) -> None:
    parser.add_argument("--shape", choices=tuple(SHAPES), help="a model of this shape instead of CONFIG's")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default %(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="ours (default %(default)s)")
    parser.add_argument("--against", choices=("transformers",), help="measure this one beside ours, with AdamW")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a measurement (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def benchmark_config(run: RunConfig, args: Namespace, argv: list[str]) -> RunConfig:
    """The run that is measured. Raises ConfigError for arguments that cannot work or do not go together."""
    for name in ("rows", "length", "turns", "steps"):
        value, least = getattr(args, name), 2 if name == "length" else 1
        require(value >= least, f"--{name} {value} must be at least {least}.")
    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")]
    for name in given:
        require(name not in REPLACED, f"--{name} means nothing here: use {REPLACED.get(name)}.")
        of_model = name.startswith("model.")
        require(not (of_model and args.shape), f"--{name} and --shape {args.shape} exclude each other: name one.")
    require(
        args.against is None or importlib.util.find_spec(args.against) is not None,
        f"--against {args.against} needs that package, which is not installed: pip install {args.against}, or leave "
        "--against out.",
    )
    train = replace(
        run.train, optimizer=args.optimizer, batch_tokens=args.rows * args.length,
        micro_batch_tokens=args.rows * args.length, batch_tokens_start=None, batch_ramp_steps=0,
    )  # fmt: skip
    model = SHAPES[args.shape] if args.shape else run.model
    return replace(run, model=model, data=replace(run.data, sequence_length=args.length), train=train)


def measure(run: RunConfig, args: Namespace) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    ours = TrainingStep(run)
    dtype = getattr(torch, ours.dtype)
    contenders: dict[str, Callable[[], float]] = {"ours": lambda: ours(args.steps)}
    peer = None
    if args.against:
        from moe_lm.bench.train_peer import Peer

        peer = Peer(ours)
        contenders["transformers"] = lambda: peer(args.steps)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    gemm, parts = [], StepParts(ours)
    for turn in range(args.turns):
        gemm.append(machine.gemm_rate.__wrapped__(ours.device, dtype))
        # Whoever comes first finds the caches as the other left them.
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            rates[name].append(contenders[name]())
        parts.take()
    seconds = parts.mean()
    flops = train_flops_per_token(run.model, run.data.sequence_length)
    found = {
        "machine": {
            "device": machine.describe(ours.device), "torch": torch.__version__, "dtype": ours.dtype,
            "gemm_flops_per_s": statistics.median(gemm), "gemm_range": [min(gemm), max(gemm)],
        },
        "model": args.shape or str(args.config_path), "parameters": parameters(run.model).total,
        "rows": args.rows, "length": args.length, "flops_per_token": flops, "optimizer": run.train.optimizer,
        "activation_checkpointing": run.train.activation_checkpointing,
        "ours": record(rates["ours"], ours.tokens, flops, gemm),
        "parts": table(seconds), "parts_step_ms": 1000 * sum(seconds.values()),
        "mean_step_ms": 1000 * statistics.mean(ours.tokens / rate for rate in rates["ours"]),
    }  # fmt: skip
    if peer is not None:
        found["transformers"] = record(rates["transformers"], ours.tokens, flops, gemm) | peer.facts()
        found["ratio"] = ratio(rates["ours"], rates["transformers"])
    return found


def record(rates: list[float], tokens: int, flops: float, gemm: list[float]) -> dict[str, Any]:
    """Medians of one contender: tokens/s with their range, a step's milliseconds, MFU. `flops` are those of a token."""
    middle = statistics.median(rates)
    return {
        "tokens_per_s": middle, "range": [min(rates), max(rates)], "step_ms": 1000 * tokens / middle,
        "mfu": middle * flops / statistics.median(gemm),
    }  # fmt: skip


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Ratio of the medians, and least and greatest of the turns' ratios."""
    turns = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"of_medians": statistics.median(ours) / statistics.median(theirs), "range": [min(turns), max(turns)]}


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for a reader."""
    here = found["machine"]
    low, high = (rate / 1e9 for rate in here["gemm_range"])
    shown = [here["other_work"]] if here["other_work"] else []
    shown += [
        f"{here['device']}, torch {here['torch']}",
        f"{here['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s in a {here['dtype']} product ({low:,.0f} to {high:,.0f})",
        f"{found['model']}: {found['parameters'] / 1e6:,.1f}M parameters, {found['flops_per_token'] / 1e6:,.1f} MFLOP "
        f"a token, {found['rows']} x {found['length']} tokens a step, {found['optimizer']}"
        f"{', blocks computed again in the backward' if found['activation_checkpointing'] else ''}",
        "",
    ]
    for name in ("ours", "transformers"):
        if name in found:
            each = found[name]
            shown.append(
                f"{name:<12} {each['tokens_per_s']:>8,.0f} tokens/s ({each['range'][0]:,.0f} to "
                f"{each['range'][1]:,.0f}), {each['step_ms']:,.0f} ms a step, MFU {each['mfu']:.3f}"
            )
    if "ratio" in found:
        low, high = found["ratio"]["range"]
        peer = found["transformers"]
        shown.append(f"ratio of medians {found['ratio']['of_medians']:.2f} (turns {low:.2f} to {high:.2f})")
        shown.append(f"transformers {peer['version']} with {peer['setting']}, the fastest of its trials: " + ", ".join(
            f"{name} {rate:,.0f}" for name, rate in peer["trials"].items()
        ))  # fmt: skip
        shown += [f"transformers with {name} is not measured: {why}" for name, why in peer["not_measured"].items()]
    ways = [way for way in DIRECTIONS if way != "recomputed" or found["activation_checkpointing"]]
    shown += ["", f"{'part':<10} " + " ".join(f"{way:>10}" for way in ways) + "  share   (ms)"]
    for line in found["parts"]:
        times = " ".join(f"{line[f'{way}_ms']:>10.2f}" for way in ways)
        shown.append(f"{line['part']:<10} {times} {line['share']:>6.1%}   {PARTS[line['part']]}")
    shown.append(
        f"sum {found['parts_step_ms']:,.1f} ms, a step with the clock in it; without, the mean is "
        f"{found['mean_step_ms']:,.1f} ms"
    )
    return shown


if __name__ == "__main__":
    run_main(main)
