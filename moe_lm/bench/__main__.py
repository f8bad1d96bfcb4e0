"""Every benchmark under one name.

    python -m moe_lm.bench machine                      # matrix rate and read bandwidth of this machine
    python -m moe_lm.bench forecast                     # the planner beside this machine
    python -m moe_lm.bench generate runs/nano           # prefill, decoding and a trace of requests
    python -m moe_lm.bench speculation runs/nano --draft runs/nano/draft
    python -m moe_lm.bench serve runs/nano              # the server under load, and what HTTP costs
    python -m moe_lm.bench train                        # tokens/s of training, and where a step's time goes

`python -m moe_lm.bench NAME ...` is `python -m moe_lm.bench.NAME ...`, and `NAME --help` its help.
"""

import runpy
import sys

from moe_lm.cli import Parser, run_main

NAMES = ("forecast", "generate", "machine", "serve", "speculation", "train")


def main(argv: list[str]) -> None:
    """Run the benchmark that `argv` names with the arguments behind the name. Raises ConfigError for any other name."""
    parser = Parser(__doc__, prog="python -m moe_lm.bench", usage="%(prog)s NAME ...")
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of {', '.join(NAMES)}")
    name = parser.parse_args(argv[:1]).name
    sys.argv[1:] = argv[1:]
    runpy.run_module(f"moe_lm.bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_main(main)
