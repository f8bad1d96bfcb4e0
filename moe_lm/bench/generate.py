"""How fast the engine generates, beside the machine's limit and beside Hugging Face transformers.

    python -m moe_lm.bench generate runs/nano --draft runs/nano/draft
    python -m moe_lm.bench generate --shape small --against transformers --json

Prefill of 512 tokens, decoding of 1, 4 and 16 requests (32 tokens of prompt, 128 new ones each), and a trace of 32
requests that arrive at once (16 to 256 and 16 to 128 tokens), all greedy and to their full length. With a draft model,
or another way of speculation, each of them also with it. The limit is what the machine's measured read bandwidth allows
for the weights that a step uses, in a prompt its matrix rate (moe_lm.bench.limits says how). Contenders and the machine
take turns, so that other work slows all alike; figures are medians over the turns, ratios medians of the turns' ratios.
The table comes first, then all figures as one line of JSON; with --json the table goes to stderr.
"""

import importlib.util
import json
import sys
from argparse import Namespace

from moe_lm.cli import Parser, run_main
from moe_lm.config import require


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m moe_lm.bench generate")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a run, checkpoint or Hugging Face model directory")
    parser.add_argument("--shape", choices=("tiny", "small", "base"), help="a model of random weights instead of MODEL")
    parser.add_argument("--draft", help="a draft model with the same tokenizer")
    parser.add_argument("--speculation", choices=("ngram", "draft", "staged"), help="default: draft if there is one")
    parser.add_argument("--draft-tokens", type=int, help="most tokens guessed at a time (default 4)")
    parser.add_argument("--against", choices=("transformers",), help="measure this one beside the engine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where that is faster")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--kv-memory", default="1GiB", help="budget of each engine's cache (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each case (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="short cases, to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, the table on stderr")
    return parser


def check_arguments(args: Namespace) -> None:
    """Raises ConfigError for arguments that do not go together."""
    require(args.model or args.shape, "there is nothing to measure: name a MODEL or a --shape, such as --shape small.")
    require(
        not (args.model and args.shape), f"MODEL {args.model} and --shape {args.shape} exclude each other: name one."
    )
    require(
        args.against is None or importlib.util.find_spec(args.against) is not None,
        f"--against {args.against} needs that package, which is not installed: pip install {args.against}, or leave "
        "--against out.",
    )
    require(args.turns >= 1, f"--turns {args.turns} must be at least 1.")
    require(
        args.draft is not None or args.speculation not in ("draft", "staged"),
        f"--speculation {args.speculation} needs a draft model: name one with --draft.",
    )
    require(
        args.draft is None or args.speculation != "ngram",
        f"--draft {args.draft} means nothing with --speculation ngram: choose draft or staged, or leave one out.",
    )
    require(
        args.draft_tokens is None or args.draft or args.speculation,
        f"--draft-tokens {args.draft_tokens} means nothing without --draft or --speculation.",
    )


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    check_arguments(args)
    from kernels.bench.measure import busy
    from kernels.cpu.process import tune_process
    from moe_lm.bench.contest import Contest
    from moe_lm.model.device import choose_device

    device = choose_device(args.device)
    other_work = busy() if device.type == "cpu" else None
    if device.type == "cpu":
        tune_process()

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    if other_work:
        say(other_work)
    found = Contest(args, device, say).run()
    found["machine"]["other_work"] = other_work
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    run_main(main)
