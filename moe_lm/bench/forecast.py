"""The planner beside this machine: predicted and measured seconds of a training step and of decoding.

    python -m moe_lm.bench forecast                       # configs/nano.toml
    python -m moe_lm.bench forecast configs/nano-dense.toml --turns 9 --json

Random weights and random tokens: neither the planner nor the machine minds. Every turn measures the machine
(moe_lm.scaling --measure), predicts, and then trains and decodes. The fastest turn counts, of the prediction as of what
was measured: other work on the machine only slows it down.
"""

import json
import statistics
from dataclasses import replace

import torch

from kernels.cpu.process import tune_process
from moe_lm.bench import machine
from moe_lm.bench.throughput import EngineContender
from moe_lm.bench.train_step import TrainingStep
from moe_lm.bench.workload import Case, random_text
from moe_lm.cli import Parser, parse_run_config, run_main
from moe_lm.config import RunConfig, require
from moe_lm.engine import Engine
from moe_lm.model import Transformer
from moe_lm.scaling.layout import settle
from moe_lm.scaling.measure import measured_machine
from moe_lm.scaling.serving import decode_rate
from moe_lm.scaling.training import step_time

BATCHES = (1, 16)
"""Requests that decode together."""
DECODES = 10
"""Times that each batch decodes in a turn; the fastest counts."""
PROMPT, OUTPUT = 32, 96
"""Tokens of each request."""


def main(argv: list[str]) -> None:
    run, args = parse_run_config(argv, __doc__, extra=add_options)
    require(args.turns >= 1, f"--turns {args.turns} must be at least 1.")
    tune_process()
    rows = compare(run, args.turns)
    if args.json:
        print(json.dumps({"machine": machine.describe(torch.device("cpu")), "rows": rows}))
        return
    print(machine.describe(torch.device("cpu")))
    for row in rows:
        print(f"{row['what']:<18} predicted {row['predicted']:>7,.0f}, measured {row['measured']:>7,.0f} tokens/s: "
              f"ratio {row['ratio']:.2f} (of medians {row['ratio_of_medians']:.2f})")  # fmt: skip


def add_options(parser: Parser) -> None:
    parser.add_argument("--turns", type=int, default=5, help="measurements of each (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def compare(run: RunConfig, turns: int) -> list[dict]:
    """Tokens per second of everything, predicted and measured: the best of all turns, and the medians' ratio."""
    train, decode = TrainingStep(replace(run, train=replace(run.train, device="cpu", dtype="auto"))), Decoding(run)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for turn in range(turns):
        machine.forget()
        here = measured_machine()
        predicted = step_time(run.model, settle(train.planned(run)), here).tokens_per_second
        pairs.setdefault("training", []).append((predicted, train()))
        for batch in BATCHES:
            predicted = decode_rate(run.model, decode.plan, here, batch=batch, context=PROMPT + OUTPUT / 2)
            # A tenth of a second each: the first one finds the caches as training left them.
            measured = max(decode(batch, DECODES * turn + i) for i in range(DECODES))
            pairs.setdefault(f"decode, batch {batch}", []).append((predicted, measured))
    rows = []
    for what, found in pairs.items():
        columns = list(zip(*found, strict=True))
        predicted, measured = map(max, columns)
        middle, other = map(statistics.median, columns)
        rows.append({"what": what, "predicted": predicted, "measured": measured, "ratio": predicted / measured,
                     "ratio_of_medians": middle / other})  # fmt: skip
    return rows


class Decoding:
    """Requests that decode together in float32, without speculation."""

    def __init__(self, run: RunConfig):
        model = Transformer(run.model).reset_parameters().eval()
        self.serve = EngineContender(Engine(model, max_sequences=max(BATCHES)), "none")
        self.text = random_text(run.model.vocab_size)
        self.plan = replace(run.serving, tp=1, pp=1, ep=1, weight_bits=32, kv_bits=32, dtype="float32")
        for batch in BATCHES:
            self(batch, 1000)

    def __call__(self, batch: int, turn: int) -> float:
        """Tokens per second once every request has one."""
        case = Case("decode", batch, (PROMPT, PROMPT), (OUTPUT, OUTPUT))
        return self.serve(case.workload(self.text, turn)).rate("decode")


if __name__ == "__main__":
    run_main(main)
