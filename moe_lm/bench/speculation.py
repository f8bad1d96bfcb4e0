"""Plain decoding against speculative decoding at batch 1, side by side.

    python -m moe_lm.bench.speculation MODEL --draft DRAFT [--prompt TEXT ...] [--repeats N] [--json]

Each prompt is continued with and without the draft, turn by turn, so that a noisy machine slows both alike; the speeds
are medians over prompts and repeats, the speed-up is the median of the pairs' ratios.
"""

import dataclasses
import json
import statistics

from tokenizers import Tokenizer

from moe_lm.engine import Generator, SamplingParams, Stats
from moe_lm.model import Transformer
from moe_lm.train.report import SpeculationRow

PROMPTS = ("def main(", "class ", "import os\n")


def compare(
    model: Transformer, draft: Transformer, tokenizer: Tokenizer, prompts: tuple[str, ...], params: SamplingParams,
    draft_tokens: int = 4, repeats: int = 3,
) -> SpeculationRow:  # fmt: skip
    """Continue every prompt `repeats` times both ways, each pair with a seed of its own; never stops early."""
    generators = {"plain": Generator(model), "speculative": Generator(model, draft, draft_tokens)}
    stats: dict[str, list[Stats]] = {name: [] for name in generators}
    for prompt in prompts:
        tokens = tokenizer.encode(prompt).ids
        for generator in generators.values():  # the first pass of a shape compiles its kernels
            generator.generate(tokens, dataclasses.replace(params, max_tokens=8))
        for repeat in range(repeats):
            order = list(generators) if repeat % 2 == 0 else list(generators)[::-1]
            for name in order:
                seeded = dataclasses.replace(params, seed=params.seed + repeat)
                stats[name].append(generators[name].generate(tokens, seeded).stats)
    rates = {name: [each.tokens_per_second for each in runs] for name, runs in stats.items()}
    drafted = stats["speculative"]
    places = max((len(each.proposed_at) for each in drafted), default=0)

    def total(name: str, place: int) -> int:
        counts = [getattr(each, name) for each in drafted]
        return sum(count[place] for count in counts if place < len(count))

    reached = [total("proposed_at", 0), *(total("accepted_at", place) for place in range(places))]
    return SpeculationRow(
        sampling="greedy" if params.temperature == 0 else f"temperature {params.temperature:g}",
        plain_tokens_per_s=statistics.median(rates["plain"]),
        speculative_tokens_per_s=statistics.median(rates["speculative"]),
        speedup=statistics.median(s / p for s, p in zip(rates["speculative"], rates["plain"], strict=True)),
        acceptance=sum(each.accepted for each in drafted) / max(1, sum(each.proposed for each in drafted)),
        tokens_per_step=sum(each.tokens - 1 for each in drafted) / max(1, sum(each.steps for each in drafted)),
        accepted_at=tuple(total("accepted_at", i) / max(1, reached[i]) for i in range(places)),
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
    from kernels.cpu.process import tune_process
    from moe_lm import load, load_tokenizer
    from moe_lm.cli import Parser

    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, checkpoint or model directory")
    parser.add_argument("--draft", required=True, help="the draft model's directory")
    parser.add_argument("--prompt", action="append", help="a prompt to continue; may be given several times")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens per draft (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per continuation (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each prompt (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    tune_process()
    model, draft, tokenizer = load(args.model), load(args.draft), load_tokenizer(args.model)
    rows = [
        compare(model, draft, tokenizer, tuple(args.prompt or PROMPTS), params, args.draft_tokens, args.repeats)
        for params in (SamplingParams(args.max_tokens, temperature=0), SamplingParams(args.max_tokens, temperature=0.7))
    ]
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) if args.json else as_table(rows))


if __name__ == "__main__":
    from moe_lm.cli import run_main

    run_main(main)
