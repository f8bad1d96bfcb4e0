"""Train a model and its draft, then let it talk.

    python train.py                                    the nano model, minutes on a laptop
    python train.py configs/tiny.toml                  another config
    python train.py --train.steps 100 --run-dir runs/short
    python train.py --resume runs/nano                 go on from the newest checkpoint

Everything ends up in the run directory: checkpoints, metrics.jsonl, report.md and report.html.
"""

import shlex
import sys
from pathlib import Path

from moe_lm.cli import Parser, parse_run_config, run_main
from moe_lm.config import ConfigError, require

ROOT = Path(__file__).resolve().parent


def add_options(parser: Parser) -> None:
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this directory")


def main(argv: list[str]) -> int:
    resume = resumed_run(argv)
    default = ROOT / "configs" / "nano.toml" if resume is None else resume / "config.toml"
    config, args = parse_run_config(argv, __doc__, default, add_options)
    if resume is not None:
        own = config.run_dir is None and args.config_path == default
        require(own, f"--resume {resume} goes on with the config in it: leave out CONFIG and --run-dir.")

    # Only now what costs seconds to import, so that --help and mistakes answer at once.
    from kernels.cpu.process import tune_process
    from moe_lm.bench.talk import talk
    from moe_lm.train import NotFinite, run

    tune_process()
    run_dir = resume or run.choose_run_dir(config, args.config_path)
    draft = run.draft_config(config, args.config_path, run_dir)
    run.open_run(run_dir, config, draft)
    data = run.prepare(config, run_dir, say)
    try:
        trained = [run.train(config, run_dir, data, say, draft=draft)]
        if trained[0] and draft:
            trained.append(run.train(draft, run_dir / "draft", data, say, target=trained[0].model))
    except NotFinite as error:
        say(str(error))
        return 1
    if None in trained:
        say(f"continue with: python train.py --resume {run_dir}")
        return 0
    talk(run_dir, config, trained, command=shlex.join(["python", "train.py", *argv]), say=say)
    return 0


def resumed_run(argv: list[str]) -> Path | None:
    """The run that --resume names. Raises ConfigError when it is none."""
    parser = Parser(add_help=False)
    add_options(parser)
    resume = parser.parse_known_args(argv)[0].resume
    if resume is not None and not (Path(resume) / "config.toml").is_file():
        raise ConfigError(f"--resume {resume} holds no run (no config.toml): name the directory of one.")
    return Path(resume) if resume is not None else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
