"""Predict what the kernels cost on a GPU, or measure them on the device that is here.

    python -m kernels.bench --predict                        # A100 and H100, the targets' shapes, three kinds of loads
    python -m kernels.bench --predict --gpu h100 --tokens 64 # any shape
    python -m kernels.bench                                  # every operation on this device
    python -m kernels.bench expert_mlp sweep --shapes nano large --json times.json --plot roofline.png
    python -m kernels.bench --gpu-suite --json suite.json    # all that a GPU is needed for, in one run

Exits with 1 if a result is wrong, with 2 and a sentence if what is asked for cannot be done.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kernels.bench.constants import GPUS
from kernels.bench.predict import OPERATIONS as PREDICTED
from kernels.bench.run import OPERATIONS
from kernels.bench.shapes import FIELDS, SHAPES, add_options, chosen

DTYPES = ("bfloat16", "float16", "float32")

SIZES = tuple(f.name for f in FIELDS)
MEANINGLESS = {
    "gpu_suite": ("ops", "predict", "gpu", "shapes", "backend", "device", "dtype", *SIZES),
    "predict": ("backend", "device", "dtype", "seconds", "quick", "plot"),
    "measure": ("gpu",),
}
"""Options that each mode has no use for, and refuses."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("ops", nargs="*", metavar="OPS", help=f"operations, all by default: {', '.join(OPERATIONS)}")
    p.add_argument("--predict", action="store_true", help="print predictions instead of measuring")
    p.add_argument("--gpu", choices=GPUS, help="the GPU to predict for (default: a100 and h100)")
    p.add_argument("--gpu-suite", action="store_true", help="tests, same bits, CUDA graphs, benchmark and prediction")
    p.add_argument("--shapes", nargs="+", metavar="NAME", help=f"named sizes: {', '.join(SHAPES)}")
    p.add_argument("--backend", help="measure this backend of ours (default: all fast ones of the device)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--seconds", type=float, default=4.0, help="time for each operation (default: 4)")
    p.add_argument("--quick", action="store_true", help="three rounds at most, whatever --seconds is")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured or predicted")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG: roofline and sweep")
    add_options(p)
    return p


def checked_ops(given: list[str], known: tuple[str, ...]) -> list[str]:
    for op in given:
        if op not in known:
            raise ValueError(f"operation {op!r} is unknown; choose among {', '.join(known)}.")
    return given or list(known)


def refuse_meaningless(args: argparse.Namespace, mode: str) -> None:
    for name in MEANINGLESS[mode]:
        if getattr(args, name) != parser().get_default(name) and getattr(args, name) != []:
            option = "naming operations" if name == "ops" else f"--{name.replace('_', '-')}"
            means = {"measure": "without --predict"}.get(mode, f"with --{mode.replace('_', '-')}")
            raise ValueError(f"{option} means nothing {means}.")


def predict(args: argparse.Namespace) -> dict[str, Any]:
    from kernels.bench.forecast import report

    ops = checked_ops(args.ops, (*PREDICTED, "sweep"))
    gpus = [GPUS[args.gpu]] if args.gpu else [GPUS["a100"], GPUS["h100"]]
    return report(gpus, ops, chosen(args.shapes or ["large"], args), args.distribution, print)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from kernels import registry
    from kernels.bench import run
    from kernels.bench.measure import busy, machine
    from kernels.bench.roofline import draw
    from kernels.cpu.process import tune_process

    ops = checked_ops(args.ops, OPERATIONS)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here.")
    known = sorted({name for names in registry.BACKENDS.values() for name in names})
    if args.backend and args.backend not in known:
        raise ValueError(f"--backend {args.backend!r} is unknown; choose among {', '.join(known)}.")
    other_work = busy() if device.type == "cpu" else None
    if device.type == "cpu":
        tune_process()
    backends = [args.backend] if args.backend else run.our_backends(device)
    shapes = chosen(args.shapes or ["large" if device.type == "cuda" else "nano"], args)
    dtype = getattr(torch, args.dtype)
    here = machine(device, dtype, 0.1 if args.quick else 1.0)
    print(
        f"{here.name}\n{run.flops_text(here.gemm)} in a {here.dtype} GEMM, {run.bytes_text(here.copy)} in a copy\n"
        "medians and quartiles; rates of cold calls; * ours" + (f"\n{other_work}" if other_work else "")
    )
    seconds = 0.0 if args.quick else args.seconds
    records = run.benchmark(ops, shapes, device, dtype, backends, here, seconds, args.quick, print)
    if args.plot:
        draw(args.plot, here, records)
    return {"machine": here._asdict(), "torch": torch.__version__, "other_work": other_work, "records": records}


def gpu_suite(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--gpu-suite needs a CUDA GPU, and torch sees none here.")
    from kernels.bench.gpu_suite import suite
    from kernels.bench.roofline import draw

    report, here = suite(torch.device("cuda"), args.seconds, args.quick, print)
    if args.plot:
        sweep = [(c["tokens"], c["predicted"]) for c in report.get("comparison", ()) if c["op"] == "sweep"]
        draw(args.plot, here, report["records"], sweep)
    return report


def main(argv: list[str]) -> int:
    from kernels.bench.run import WrongResult

    args = parser().parse_args(argv)
    try:
        mode = "gpu_suite" if args.gpu_suite else "predict" if args.predict else "measure"
        refuse_meaningless(args, mode)
        found = {"gpu_suite": gpu_suite, "predict": predict, "measure": measure}[mode](args)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except WrongResult as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if found.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
