"""Plain decoding against speculative decoding at batch 1, side by side.

    python -m moe_lm.bench.speculation MODEL --draft DRAFT [--prompt TEXT ...] [--repeats N] [--dtype DTYPE] [--json]

Each prompt is continued with and without the draft, turn by turn, so that a noisy machine slows both alike; the speeds
are medians over prompts and repeats, the speed-up is the median of the pairs' ratios.
"""

import dataclasses
import json
import statistics
import time
from itertools import zip_longest
from typing import NamedTuple

from tokenizers import Tokenizer

from moe_lm.engine import Engine, SamplingParams, Stats
from moe_lm.model import Transformer
from moe_lm.train.report import SpeculationRow

PROMPTS = ("def main(", "class ", "import os\n")


class Run(NamedTuple):
    """One continuation."""

    stats: Stats
    tokens_per_second: float
    """After the first token."""


def run(engine: Engine, tokens: list[int], params: SamplingParams) -> Run:
    engine.reset_stats()
    first = None
    for _ in engine.stream(tokens, params):
        now = time.perf_counter()
        first = first or now
    return Run(engine.stats, (engine.stats.tokens - 1) / (now - first) if now > first else 0.0)


def total(counts: list[dict[str, list[int]]]) -> list[int]:
    """Sums by place in the draft, over all kinds of speculation."""
    return [sum(places) for places in zip_longest(*(own for each in counts for own in each.values()), fillvalue=0)]


def compare(
    model: Transformer, draft: Transformer, tokenizer: Tokenizer, prompts: tuple[str, ...], params: SamplingParams,
    draft_tokens: int = 4, repeats: int = 3,
) -> SpeculationRow:  # fmt: skip
    """Continue every prompt `repeats` times both ways, each pair with a seed of its own; never stops early."""
    engines = {
        name: Engine(model, tokenizer, draft, speculation=name, draft_tokens=draft_tokens, max_sequences=1)
        for name in ("none", "draft")
    }  # fmt: skip
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for prompt in prompts:
        tokens = tokenizer.encode(prompt).ids
        for engine in engines.values():  # the first step of a shape compiles its kernels
            run(engine, tokens, dataclasses.replace(params, max_tokens=min(8, params.max_tokens)))
        for repeat in range(repeats):
            order = list(engines) if repeat % 2 == 0 else list(engines)[::-1]
            for name in order:
                runs[name].append(run(engines[name], tokens, dataclasses.replace(params, seed=params.seed + repeat)))
    rates = {name: [each.tokens_per_second for each in own] for name, own in runs.items()}
    drafted = [each.stats for each in runs["draft"]]
    proposed = total([stats.proposed_at for stats in drafted])
    accepted = total([stats.accepted_at for stats in drafted])
    # A place is reached by the guesses whose earlier places all stood.
    reached = [sum(stats.verifies for stats in drafted), *accepted]
    return SpeculationRow(
        sampling="greedy" if params.temperature == 0 else f"temperature {params.temperature:g}",
        plain_tokens_per_s=statistics.median(rates["none"]),
        speculative_tokens_per_s=statistics.median(rates["draft"]),
        speedup=statistics.median(s / p for s, p in zip(rates["draft"], rates["none"], strict=True)),
        acceptance=sum(accepted) / max(1, sum(proposed)),
        tokens_per_step=sum(stats.decoded for stats in drafted) / max(1, sum(stats.decodes for stats in drafted)),
        accepted_at=tuple(number / max(1, at) for number, at in zip(accepted, reached, strict=False)),
    )


def as_table(rows: list[SpeculationRow]) -> str:
    """The comparisons as lines of text."""
    lines = [f"{'':18}{'plain':>10}{'with draft':>12}{'speed-up':>10}{'accepted':>10}{'tokens/step':>13}"]
    lines += [
        f"{row.sampling:18}{row.plain_tokens_per_s:>10.0f}{row.speculative_tokens_per_s:>12.0f}"
        f"{row.speedup:>9.2f}x{row.acceptance:>10.0%}{row.tokens_per_step:>13.2f}"
        for row in rows
    ]
    return "\n".join([*lines, "(tokens per second at batch 1, medians)"])


def main(argv: list[str]) -> None:
    import torch

    from kernels.cpu.process import tune_process
    from moe_lm import load, load_tokenizer
    from moe_lm.bench.machine import fastest_dtype
    from moe_lm.cli import Parser

    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, checkpoint or model directory")
    parser.add_argument("--draft", required=True, help="the draft model's directory")
    parser.add_argument("--prompt", action="append", help="a prompt to continue; may be given several times")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens per draft (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per continuation (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each prompt (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where that is faster")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    tune_process()
    dtype = getattr(torch, args.dtype) if args.dtype else fastest_dtype(torch.device("cpu"))
    model, draft = (load(each, dtype=dtype) for each in (args.model, args.draft))
    tokenizer = load_tokenizer(args.model)
    rows = [
        compare(model, draft, tokenizer, tuple(args.prompt or PROMPTS), params, args.draft_tokens, args.repeats)
        for params in (SamplingParams(args.max_tokens, temperature=0), SamplingParams(args.max_tokens, temperature=0.7))
    ]
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) if args.json else as_table(rows))


if __name__ == "__main__":
    from moe_lm.cli import run_main

    run_main(main)
