"""Train a config once for every combination of settings and seeds, and say which ends lowest.

    python -m moe_lm.bench sweep configs/nano.toml --over train.learning_rate=3e-3,6e-3,12e-3 --steps 100
    python -m moe_lm.bench sweep --over train.muon_learning_rate=0.005,0.01,0.02 --over train.weight_decay=0,0.1 \\
        --seeds 2 --steps 200 --json sweep.jsonl

`--over A+B=1+2,3+4` changes settings together: first A = 1 with B = 2, then A = 3 with B = 4. Any other --section.key
holds for all. With --minutes every training has so much time of its own, and its learning rate follows that time; the
machine should be quiet then, since the trainings come one after another. With --json finished trainings are kept in
that file, one a line, and the same command goes on where it was stopped. Scores are held-out bits per byte.
"""

import itertools
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
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
from moe_lm.cli import Parser, parse_run_config, run_main
from moe_lm.config import RunConfig, require
from moe_lm.data import prepare_data

SHAPE = frozenset(
    f"model.{name}"
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "n_shared_experts",
    )
)  # fmt: skip
"""The settings that make another model."""
Choice = tuple[str, ...]
"""The values of all swept settings in one combination, as text in the order of the axes' keys."""


@dataclass(frozen=True)
class Axis:
    """Settings that change together, and the values that they take."""

    keys: tuple[str, ...]
    values: tuple[Choice, ...]

    @property
    def is_shape(self) -> bool:
        """Whether it makes another model, whose best settings are a question of their own."""
        return any(key in SHAPE for key in self.keys)


def parse_axis(text: str) -> Axis:
    """`A=1,2` or `A+B=1+2,3+4`. Raises ConfigError where it is neither."""
    left, equals, right = text.partition("=")
    keys = tuple(key.replace("-", "_") for key in left.split("+"))
    require(
        bool(equals) and all(keys) and bool(right),
        f"--over {text} must be KEY=VALUE,VALUE,... such as train.learning_rate=3e-3,6e-3.",
    )
    values = tuple(tuple(part.split("+", len(keys) - 1)) for part in right.split(","))
    for value in values:
        require(
            len(value) == len(keys) and all(value),
            f"--over {text} names {len(keys)} settings, and {'+'.join(value)!r} is not one value for each: write "
            "them with + between.",
        )
    require(len(set(values)) == len(values), f"--over {text} names a value twice: leave one out.")
    return Axis(keys, values)


def check_arguments(args: Namespace, axes: Sequence[Axis]) -> None:
    """Raises ConfigError for arguments that do not go together."""
    require(bool(axes), "there is nothing to sweep: name a setting with --over, such as train.learning_rate=3e-3,6e-3.")
    keys = [key for axis in axes for key in axis.keys]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    require(twice is None, f"--over names {twice} twice: give all of its values in one.")
    for key in ("train.seed", "train.steps"):
        option = key.replace("train.", "--") + ("s" if key == "train.seed" else "")
        require(key not in keys, f"--over {key} is not swept: choose with {option}.")
    require(args.seeds >= 1, f"--seeds {args.seeds} must be at least 1.")
    require(args.minutes is None or args.minutes > 0, f"--minutes {args.minutes} must be greater than 0.")
    require(args.steps is None or args.steps > 0, f"--steps {args.steps} must be greater than 0.")
    require(
        args.minutes is None or args.steps is None,
        f"--minutes {args.minutes} and --steps {args.steps} exclude each other: leave one out.",
    )


def combinations(argv: list[str], axes: Sequence[Axis]) -> dict[Choice, RunConfig]:
    """The config of every combination: the command line with its values behind it, and so as strictly read."""
    keys = [key for axis in axes for key in axis.keys]
    configs = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        choice = tuple(itertools.chain(*values))
        words = [word for key, value in zip(keys, choice, strict=True) for word in (f"--{key}", value)]
        configs[choice] = parse_run_config([*argv, *words], __doc__, extra=add_options)[0]
    return configs


def edges(axes: Sequence[Axis], best: Choice) -> list[str]:
    """A sentence for every number of `best` that is the least or the greatest tried."""
    sentences, place = [], 0
    for axis in axes:
        for column, key in enumerate(axis.keys):
            value, tried = best[place], {values[column] for values in axis.values}
            place += 1
            try:
                edge = edge_of(float(value), map(float, tried))
            except ValueError:
                continue
            if edge and not axis.is_shape:
                end, side = edge
                sentences.append(f"the best {key}, {value}, is the {end} tried: try {side} ones before trusting it.")
    return sentences


def best_choices(axes: Sequence[Axis], found: dict[Choice, list[Record]]) -> list[Choice]:
    """The choice with the lowest mean for every model, of those that came to their end."""
    shape = [axis.is_shape for axis in axes for _ in axis.keys]
    groups: dict[Choice, list[Choice]] = {}
    for choice in found:
        groups.setdefault(tuple(itertools.compress(choice, shape)), []).append(choice)
    best = []
    for choices in groups.values():
        ended = {choice: bits for choice in choices if (bits := mean_bits(found[choice])) is not None}
        if ended:
            best.append(min(ended, key=ended.get))
    return best


def table(axes: Sequence[Axis], found: dict[Choice, list[Record]]) -> list[str]:
    """The results as lines of text, the best of every model marked."""
    keys = [key.rpartition(".")[2] for axis in axes for key in axis.keys]
    widths = [max(len(key), *(len(choice[i]) for choice in found)) for i, key in enumerate(keys)]
    sources = short_names([each for records in found.values() for each in records])
    heads = ["bits/byte", "spread", *sources.values(), "tokens/s"]
    best = best_choices(axes, found)
    lines = ["  ".join([*(key.rjust(width) for key, width in zip(keys, widths, strict=True)),
                        *(head.rjust(9) for head in heads)])]  # fmt: skip
    for choice, records in found.items():
        bits = mean_bits(records)
        cells = [value.rjust(width) for value, width in zip(choice, widths, strict=True)]
        if bits is None:
            lines.append("  ".join([*cells, "given up: a loss or gradient was not finite"]))
            continue
        numbers = [
            bits,
            spread_of(records),
            *(statistics.fmean(r["by_source"][name] for r in records) for name in sources),
        ]
        cells += [f"{number:9.4f}" for number in numbers]
        cells.append(f"{statistics.median(record['tokens_per_s'] for record in records):9,.0f}")
        lines.append("  ".join(cells) + ("  <- best" if choice in best else ""))
    return lines


def run_sweep(args: Namespace, axes: Sequence[Axis], configs: dict[Choice, RunConfig], say: Say) -> None:
    """Train what is not on file, telling `say` how it goes, and print the table."""
    results = Results(args.json)
    found: dict[Choice, list[Record]] = {}
    prepared = {}
    keys = [key.rpartition(".")[2] for axis in axes for key in axis.keys]
    for choice, config in configs.items():
        name = ", ".join(f"{key} {value}" for key, value in zip(keys, choice, strict=True))
        train = {} if args.steps is None else {"steps": args.steps}
        for seed in range(config.train.seed, config.train.seed + args.seeds):
            arm = Arm(name, with_seed(config, seed, **train), args.minutes and 60 * args.minutes)
            if arm.key not in results.found:
                what = config.data, config.model.vocab_size
                if what not in prepared:
                    prepared[what] = prepare_data(*what, progress=say)
                train_round([arm], prepared[what], results, 10.0, say)
            record = results.found[arm.key]
            found.setdefault(choice, []).append(record)
            bits = record["bits_per_byte"]
            say(f"{name}, seed {seed}: " + ("given up" if bits is None else f"{bits:.4f} held-out bits per byte"))
    print("\n".join(table(axes, found)))
    if args.seeds > 1:
        print(f"spread: from the lowest to the highest of {args.seeds} seeds")
    best = best_choices(axes, found)
    for sentence in dict.fromkeys(sentence for choice in best for sentence in edges(axes, choice)):
        print(sentence)


def add_options(parser: Parser) -> None:
    parser.add_argument("--over", action="append", default=[], metavar="KEY=VALUE,VALUE", help="a setting to sweep")
    parser.add_argument(
        "--seeds", type=int, default=1, help="trainings of each, from train.seed on (default %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="of every training, instead of steps")
    parser.add_argument("--steps", type=int, help="of every training (default: train.steps)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are kept, and taken up again")


def main(argv: list[str]) -> None:
    _, args = parse_run_config(argv, __doc__, extra=add_options)
    axes = [parse_axis(text) for text in args.over]
    check_arguments(args, axes)
    configs = combinations(argv, axes)
    from kernels.cpu.process import tune_process

    tune_process()
    run_sweep(args, axes, configs, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    run_main(main)
