"""Every benchmark under one name.

    python -m moe_lm.bench machine                      # matrix rate and read bandwidth of this machine
    python -m moe_lm.bench forecast                     # the planner beside this machine
    python -m moe_lm.bench generate runs/nano           # prefill, decoding and a trace of requests
    python -m moe_lm.bench speculation runs/nano --draft runs/nano/draft
    python -m moe_lm.bench serve runs/nano              # the server under load, and what HTTP costs
    python -m moe_lm.bench train                        # tokens/s of training, and where a step's time goes
    python -m moe_lm.bench moe-vs-dense                 # whether a mixture is worth its time
    python -m moe_lm.bench data-ablation                # what cleaning the text is worth
    python -m moe_lm.bench sweep configs/nano.toml --over train.learning_rate=3e-3,6e-3

`python -m moe_lm.bench NAME ...` is `python -m moe_lm.bench.NAME ...` with _ for -, and `NAME --help` its help.
"""

import runpy
import sys

from moe_lm.cli import Parser, run_main

NAMES = ("data-ablation", "forecast", "generate", "machine", "moe-vs-dense", "serve", "speculation", "sweep", "train")


def main(argv: list[str]) -> None:
    """Run the benchmark that `argv` names with the arguments behind the name. Raises ConfigError for any other name."""
    parser = Parser(__doc__, prog="python -m moe_lm.bench", usage="%(prog)s NAME ...")
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of {', '.join(NAMES)}")
    name = parser.parse_args(argv[:1]).name
    sys.argv[1:] = argv[1:]
    runpy.run_module(f"moe_lm.bench.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_main(main)
