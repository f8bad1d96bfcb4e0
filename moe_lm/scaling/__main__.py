"""What a model costs: parameters, FLOPs, memory per GPU, time and money of training and serving, without building it.

    python -m moe_lm.scaling gpt4-1.8t                        # a config of configs/, or the path of one
    python -m moe_lm.scaling gpt4-1.8t --gpu a100-80 h100     # the same on several kinds of GPU
    python -m moe_lm.scaling mixtral-8x7b --gpus 64 --tp 4 --ep 8 --zero 1 --serving.batch 64
    python -m moe_lm.scaling llama-2-70b --gpus 256 --search  # the fastest layouts that fit
    python -m moe_lm.scaling gpt4-1.8t-serve --sweep          # serving over batches, contexts, layouts, bits and drafts
    python -m moe_lm.scaling nano --gpu cpu --measure         # on this machine, measured now
    python -m moe_lm.scaling gpt4-1.8t --plot plots --html plan.html
    python -m moe_lm.scaling gpt4-1.8t --check                # built on the meta device, its shards counted
    python -m moe_lm.scaling --facts                          # the reported facts, computed
    python -m moe_lm.scaling --validate                       # predictions beside published measurements
    python -m moe_lm.scaling fit runs/*                       # a scaling law through finished runs

--tp, --pp, --ep, --dp, --zero and the like lay out training ([plan]); serving has its own: --serving.tp and so on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lm.cli import Parser, parse_run_config, run_main
from moe_lm.config import RunConfig, require
from moe_lm.scaling.configs import config_path
from moe_lm.scaling.hardware import Machine, machine

LAYOUT = ("tp", "pp", "ep", "zero", "zero_group", "micro_batch", "interleave", "recompute")
"""Settings of [plan] that are asked for so often that they go by their own names, too; and --gpus."""


def main(argv: list[str]) -> int | None:
    if argv[:1] == ["fit"]:
        return fit(argv[1:])
    if "--facts" in argv or "--validate" in argv:
        return report(argv)
    run, args = parse_run_config(argv, __doc__, "nano", add_options, config_path)
    run = with_replicas(run, args.dp)
    training = machines(args, run.plan.gpu)
    if args.check:
        return check(run)
    if args.search:
        return search(run, training, args)
    serving = machines(args, run.serving.gpu)
    return sweep(run, serving, args) if args.sweep else show(run, training, serving, args)


def add_options(parser: Parser) -> None:
    group = parser.add_argument_group("layout", "--NAME is short for --plan.NAME; --dp D for --gpus of tp x pp x D")
    for name in LAYOUT:
        group.add_argument(f"--{name}", dest=f"plan.{name}", metavar="VALUE", default=argparse.SUPPRESS)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--gpus", dest="plan.gpus", metavar="INTEGER", default=argparse.SUPPRESS)
    either.add_argument("--dp", type=int, metavar="INTEGER")
    parser.add_argument("--gpu", nargs="+", metavar="NAME", help="kinds of GPU, for training and serving: sheets of "
                        "configs/hardware, or paths of others (default: those of [plan] and [serving])")  # fmt: skip
    parser.add_argument("--measure", nargs="?", const="", metavar="FILE", help="measure this machine and use that for "
                        "--gpu cpu; with FILE write the sheet there, too")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="find the fastest layouts of training that fit")
    parser.add_argument("--sweep", action="store_true", help="serving over batches, contexts, layouts, bits and drafts")
    parser.add_argument("--check", action="store_true", help="build the model on the meta device and count its shards")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures there (needs matplotlib)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the whole answer as one page")
    parser.add_argument("--json", action="store_true", help="print JSON")


def with_replicas(run: RunConfig, dp: int | None) -> RunConfig:
    """The run with as many GPUs as `dp` replicas take; as it is if that is None."""
    if dp is None:
        return run
    return replace(run, plan=replace(run.plan, gpus=run.plan.tp * run.plan.pp * dp))


def machines(args: Any, planned: str) -> list[Machine]:
    """The devices that --gpu names, or the planned one; `cpu` as measured now with --measure."""
    names = args.gpu or [planned]
    if args.measure is None:
        return [machine(name) for name in names]
    require("cpu" in names, f"--measure measures this machine, and --gpu is {' '.join(names)}: add --gpu cpu.")
    from moe_lm.scaling.measure import measured_machine

    return [measured_machine(args.measure) if name == "cpu" else machine(name) for name in names]


def show(run: RunConfig, training: list[Machine], serving: list[Machine], args: Any) -> None:
    """Print the plan, and write its pictures and its page."""
    from moe_lm.scaling.plan import as_json, make_plan
    from moe_lm.scaling.tables import plan_text

    plan = make_plan(args.config_path.stem, run, training, serving)
    print(json.dumps(as_json(plan)) if args.json else plan_text(plan))
    if args.plot:
        from moe_lm.scaling.pictures import write_plots

        write_plots(plan, args.plot)
    if args.html:
        from moe_lm.scaling.pictures import write_page

        write_page(plan, args.html)


def search(run: RunConfig, training: list[Machine], args: Any) -> None:
    """Print the fastest layouts on each kind of GPU."""
    from moe_lm.scaling.plan import as_json
    from moe_lm.scaling.search import search as find
    from moe_lm.scaling.tables import search_text
    from moe_lm.scaling.training import step_time

    gpus = run.plan.gpus or run.plan.tp * run.plan.pp * run.plan.ep
    found = [(each, find(run, each, gpus, step_time)) for each in training]
    if args.json:
        print(json.dumps([{"gpu": each.sheet.name, "layouts": as_json(layouts)} for each, layouts in found]))
    else:
        print("\n\n".join(search_text(each, gpus, layouts) for each, layouts in found))


def sweep(run: RunConfig, serving: list[Machine], args: Any) -> None:
    """Print the tables of serving for each kind of GPU."""
    from moe_lm.scaling.plan import as_json
    from moe_lm.scaling.sweeps import sweeps, sweeps_text

    found = [(each, sweeps(run.model, run.serving, each)) for each in serving]
    if args.json:
        print(json.dumps([{"gpu": each.sheet.name, **as_json(tables)} for each, tables in found]))
    else:
        name = args.config_path.stem
        print("\n\n".join(sweeps_text(name, run.serving, each, tables) for each, tables in found))


def check(run: RunConfig) -> int:
    """Compare the shards in closed form with those of the model on the meta device; exit status 1 if they differ."""
    from moe_lm.scaling import meta

    plan = run.plan
    wrong = meta.check(run.model, plan.tp, plan.pp, plan.ep)
    print(*wrong, sep="\n") if wrong else print(
        f"every weight of tp {plan.tp} x pp {plan.pp} x ep {plan.ep} has the closed form's bytes on every rank"
    )
    return int(bool(wrong))


def report(argv: list[str]) -> int:
    """--facts or --validate."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--facts", action="store_true", help="compute the reported facts; exit status 1 if one is off")
    which.add_argument("--validate", action="store_true", help="predict published measurements")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="--validate: write a picture there (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    require(args.validate or not args.plot, "--plot goes with --validate or a CONFIG, not with --facts.")
    return print_facts(args.json) if args.facts else print_validation(args)


def print_facts(as_object: bool) -> int:
    from moe_lm.scaling.facts import facts
    from moe_lm.scaling.facts.text import facts_text

    rows = facts()
    print(json.dumps({"rows": [row.as_json() for row in rows]}) if as_object else facts_text(rows))
    return int(any(row.verdict == "off" for row in rows))


def print_validation(args: Any) -> int:
    from moe_lm.scaling import validate
    from moe_lm.scaling.published import published

    found = validate.validate(*published())
    print(json.dumps(validate.to_json(found)) if args.json else validate.validation_table(found))
    if args.plot:
        from moe_lm.scaling import pictures, plots

        drawn = plots.validation_plot(found, "Predicted against measured, each family predicted from the others")
        pictures.write_pictures({"validation": drawn}, args.plot)
    return 0


def fit(argv: list[str]) -> None:
    """Print the scaling law of finished runs."""
    from moe_lm.scaling import laws

    parser = Parser(laws.__doc__, prog="python -m moe_lm.scaling fit")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a finished run, such as runs/nano")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a picture there (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    found = laws.fit(laws.read_runs(args.runs))
    print(json.dumps(laws.to_json(found)) if args.json else laws.law_table(found))
    if args.plot:
        from moe_lm.scaling import pictures, plots

        pictures.write_pictures({"scaling-law": plots.law_plot(found, "Held-out loss against compute")}, args.plot)


if __name__ == "__main__":
    run_main(main)
