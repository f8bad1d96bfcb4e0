"""Whether a mixture is worth its time: it and a dense model of as many active parameters, trained side by side.

    python -m moe_lm.bench moe-vs-dense --minutes 10 --seeds 3               # nano and nano-dense
    python -m moe_lm.bench moe-vs-dense --minutes 10 --seeds 3 --sweep --json runs/moe-vs-dense.jsonl
    python -m moe_lm.bench moe-vs-dense my-mixture.toml my-dense.toml --minutes 30 --rates 1

A setting, such as --train.batch_tokens 4096, is one of both.

For every seed both train for equal tokens (as many steps as --steps says; the same every time), and for equal
wall-clock: M minutes inside their own training steps, the learning rate following the share of them that is spent.
Before either both try the learning rates of --rates, multiples of their configs' (AdamW's and Muon's alike), with the
first seed and a third of the steps or minutes, and each keeps its best: longer trainings want lower rates. They see the
same data in the same order and take turns of a few seconds, so that other work on the machine slows both alike. With
--sweep mixtures of 4, 16 and 64 such experts are trained beside them; 1 is the dense model. Scores are held-out bits
per byte, and the spread is that between seeds.

With --json every finished round is kept in that file, one training a line, and the same command goes on there.
"""

import dataclasses
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from moe_lm.bench.arms import (
    Arm,
    Record,
    Results,
    Say,
    edge_of,
    mean_bits,
    short_names,
    spread_of,
    train_round,
    with_seed,
)
from moe_lm.cli import Parser, overridden, parse_run_config, run_main
from moe_lm.config import ConfigError, RunConfig, require
from moe_lm.data import PreparedData, prepare_data
from moe_lm.scaling.counts import parameters

EXPERTS = (4, 16, 64)
"""Of the sweep; one expert that every token goes to is the dense model."""


def tell(text: str) -> None:
    """A result, seen at once where the output is a file."""
    print(text, flush=True)


class Comparison:
    """The contenders and what is known of them. `say` takes lines of progress, standard output the results."""

    def __init__(self, args: Namespace, mixture: RunConfig, dense: RunConfig, data: PreparedData, say: Say):
        self.args, self.data, self.say = args, data, say
        self.configs = {args.config_path.stem: mixture, args.dense.stem: dense}
        self.mixture, self.dense = self.configs
        self.steps = args.steps or mixture.train.steps
        self.results = Results(args.json)
        self.factors = dict.fromkeys(self.configs, 1.0)
        """Of the learning rates in the config: the best one."""

    def run(self) -> None:
        for name, config in self.configs.items():
            counts = parameters(config.model)
            tell(f"{name}: {counts.total / 1e6:.2f}M parameters, {counts.active / 1e6:.2f}M active per token")
        minutes = self.args.minutes
        budgets = {
            f"equal tokens, {self.steps} steps": None,
            f"equal wall-clock, {minutes:g} minutes each": 60 * minutes,
        }
        for title, seconds in budgets.items():
            tell("")
            if len(self.args.rates) > 1:
                self.choose_rates(seconds)
            else:
                self.factors = dict.fromkeys(self.configs, self.args.rates[0])
            found: dict[str, list[Record]] = {}
            for seed in range(self.args.seeds):
                arms = self.round(seed, seconds)
                records = train_round(arms, self.data, self.results, self.args.turn, self.say)
                for arm, record in zip(arms, records, strict=True):
                    found.setdefault(arm.name, []).append(record)
            tell(f"{title}\n" + "\n".join(table(found)))
            tell(verdict(self.mixture, self.dense, found[self.mixture], found[self.dense]))

    def choose_rates(self, seconds: float | None) -> None:
        """The best multiple of each config's learning rates, and a warning where it is the least or greatest tried.

        `seconds` are those that will be trained for, None where steps are counted.
        """
        rates, steps = sorted(self.args.rates), max(1, self.steps // 3)
        third = None if seconds is None else seconds / 3
        arms = {
            (name, rate): Arm(f"{name} x{rate:g}", self.seeded(config, 0, rate, steps), third)
            for name, config in self.configs.items()
            for rate in rates
        }
        records = train_round(list(arms.values()), self.data, self.results, self.args.turn, self.say)
        scores = {key: record["bits_per_byte"] for key, record in zip(arms, records, strict=True)}
        length = f"{steps} steps" if seconds is None else f"{third:g} s"
        tell(f"learning rates, as multiples of the config's: held-out bits per byte after {length}")
        for name in self.configs:
            bits = {rate: scores[name, rate] for rate in rates if scores[name, rate] is not None}
            if not bits:
                raise ConfigError(f"{name} came to no end at any of --rates {rates}: try lower ones.")
            best = self.factors[name] = min(bits, key=bits.get)
            tell(
                f"{name}: " + ", ".join(f"x{rate:g} {value:.4f}" for rate, value in bits.items()) + f"; best x{best:g}"
            )
            if edge := edge_of(best, rates):
                end, side = edge
                tell(
                    f"the best of {name}, x{best:g}, is the {end} tried: add a {side} one to --rates before trusting "
                    "what follows."
                )

    def round(self, seed: int, seconds: float | None) -> list[Arm]:
        """What is trained side by side with one seed."""
        arms = [
            Arm(name, self.seeded(config, seed, self.factors[name], self.steps), seconds)
            for name, config in self.configs.items()
        ]
        mixture = arms[0].config
        for experts in EXPERTS if self.args.sweep else ():
            if experts != mixture.model.num_local_experts:
                model = dataclasses.replace(mixture.model, num_local_experts=experts)
                arms.append(Arm(f"{experts} experts", dataclasses.replace(mixture, model=model), seconds))
        return arms

    def seeded(self, config: RunConfig, seed: int, factor: float, steps: int) -> RunConfig:
        train = config.train
        return with_seed(
            config, train.seed + seed, steps=steps, learning_rate=factor * train.learning_rate,
            muon_learning_rate=factor * train.muon_learning_rate,
        )  # fmt: skip


def table(found: dict[str, list[Record]]) -> list[str]:
    """A line for every contender, in the order of total parameters."""
    sources = short_names([each for records in found.values() for each in records])
    width = max(map(len, found))
    heads = ["params", "active", "tokens", "tokens/s", "bits/byte", "spread"]
    heads += sources.values()
    lines = ["  ".join([" " * width, *(head.rjust(9) for head in heads)])]
    for name, records in sorted(found.items(), key=lambda item: item[1][0]["parameters"]):
        first, bits = records[0], mean_bits(records)
        cells = [f"{first['parameters'] / 1e6:8.2f}M", f"{first['active'] / 1e6:8.2f}M"]
        cells += [f"{statistics.fmean(each['tokens'] for each in records) / 1e6:8.2f}M"]
        cells += [f"{statistics.fmean(each['tokens_per_s'] for each in records):9,.0f}"]
        if bits is None:
            cells.append("given up: a loss or gradient was not finite")
        else:
            numbers = [bits, spread_of(records)]
            numbers += [statistics.fmean(each["by_source"][source] for each in records) for source in sources]
            cells += [f"{number:9.4f}" for number in numbers]
        lines.append("  ".join([name.ljust(width), *cells]))
    return lines


def verdict(name: str, other: str, ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """What the paired differences of the seeds say, beside how far the seeds of one model lie apart."""
    if mean_bits(ours) is None or mean_bits(theirs) is None:
        return f"{name} against {other}: one of them came to no end, so there is nothing to compare."
    differences = [our["bits_per_byte"] - their["bits_per_byte"] for our, their in zip(ours, theirs, strict=True)]
    mean, spread = statistics.fmean(differences), max(spread_of(ours), spread_of(theirs))
    speed = statistics.fmean(
        our["tokens_per_s"] / their["tokens_per_s"] for our, their in zip(ours, theirs, strict=True)
    )
    text = f"{name} is {abs(mean):.4f} bits per byte {'lower' if mean < 0 else 'higher'} than {other}"
    if len(differences) == 1:
        text += "; one seed says nothing of the spread"
    else:
        text += f" (by seed {', '.join(f'{difference:+.4f}' for difference in differences)}), "
        alike = min(differences) > 0 or max(differences) < 0
        if abs(mean) > spread and alike:
            text += f"more than the spread of {spread:.4f}: {'the mixture' if mean < 0 else 'the dense model'} wins"
        else:
            text += f"against a spread of {spread:.4f}: neither wins"
    return f"{text}. It trains at {speed:.2f}x the tokens per second."


def check_pair(mixture: RunConfig, dense: RunConfig, args: Namespace) -> None:
    """Raise ConfigError where the two cannot be compared."""
    experts, top_k = dense.model.num_local_experts, mixture.model.num_experts_per_tok
    first, second = args.config_path, args.dense
    require(mixture.model.is_moe, f"{first} has no experts: name the mixture first, then the dense config.")
    require(experts == 0, f"{second} has num_local_experts = {experts}: name a dense config second.")
    require(first.stem != second.stem, f"{first} and {second} have one name: rename a file.")
    for what, here, there in (
        ("data", mixture.data, dense.data),
        ("model.vocab_size", mixture.model.vocab_size, dense.model.vocab_size),
        ("train.seed", mixture.train.seed, dense.train.seed),
        ("train.eval_tokens", mixture.train.eval_tokens, dense.train.eval_tokens),
    ):
        require(here == there, f"{what} of {first} and {second} differ, {here} and {there}: make them alike.")
    require(
        not args.sweep or top_k <= min(EXPERTS),
        f"--sweep goes down to {min(EXPERTS)} experts, and num_experts_per_tok = {top_k} is more: leave --sweep out.",
    )


def parse_rates(text: str) -> tuple[float, ...]:
    """Positive numbers between commas. Raises ConfigError for anything else."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    good = rates and all(0 < rate < float("inf") for rate in rates) and len(set(rates)) == len(rates)
    require(bool(good), f"--rates {text} must be different positive numbers, such as 0.5,1,2; 1 alone tries none.")
    return rates


def add_options(parser: Parser) -> None:
    parser.add_argument("dense", metavar="DENSE", nargs="?", type=Path, default=Path("configs/nano-dense.toml"),
                        help="the config of the dense model (default %(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10, help="of training for each (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default %(default)s)")
    parser.add_argument("--steps", type=int, help="for equal tokens (default: train.steps of the mixture)")
    parser.add_argument("--rates", default="0.5,1,2", help="multiples of the learning rates (default %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="other numbers of experts beside them")
    parser.add_argument("--turn", type=float, default=10, help="seconds of a turn (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept, and taken up again")


def main(argv: list[str]) -> None:
    mixture, args = parse_run_config(argv, __doc__, extra=add_options)
    dense = overridden(args.dense, args.overrides)
    for name in ("minutes", "seeds", "steps", "turn"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} {value} must be greater than 0.")
    args.rates = parse_rates(args.rates)
    check_pair(mixture, dense, args)
    from kernels.bench.measure import busy
    from kernels.cpu.process import tune_process

    other_work = busy()
    if other_work:
        tell(other_work)
    tune_process()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    data = prepare_data(mixture.data, mixture.model.vocab_size, progress=say)
    Comparison(args, mixture, dense, data, say).run()


if __name__ == "__main__":
    run_main(main)
