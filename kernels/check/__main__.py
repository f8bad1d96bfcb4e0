"""Check the Triton kernels without a GPU.

    python -m kernels.check                       # every shipped configuration, for sm_80 and sm_90
    python -m kernels.check --arch sm_90 --json   # one architecture, as JSON
    python -m kernels.check --only "rms norm"     # the configurations whose name contains that
    python -m kernels.check --self-test           # the same, and then: is every mistake made on purpose noticed?

Exits with 0 if all is well, with 1 if a kernel breaks a rule or a mistake goes unnoticed, with 2 if it cannot check.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NoReturn

from kernels.check import CannotCheckError

ARCHES = {"sm_80": 80, "sm_90": 90}

Rows = list[dict[str, Any]]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CannotCheckError(f"{message}.")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises CannotCheckError on arguments that mean nothing."""
    parser = Parser(
        "python -m kernels.check", description="Check the Triton kernels without a GPU.", allow_abbrev=False
    )
    parser.add_argument("--arch", default="sm_80,sm_90", help="architectures, separated by commas (all)")
    parser.add_argument("--only", default="", help="check what has this in its name, of configurations or mistakes")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--self-test", action="store_true", help="then break kernels on purpose: is it noticed?")
    args = parser.parse_args(argv)
    args.arch = list(dict.fromkeys(args.arch.split(",")))
    for name in args.arch:
        if name not in ARCHES:
            raise CannotCheckError(f"--arch {name!r} is unknown; choose from {', '.join(ARCHES)}, separated by commas.")
    return args


def main(argv: list[str]) -> tuple[str, int]:
    """What to say, and the exit status."""
    try:
        args = parse(argv)
        rows, results = run(args)
    except CannotCheckError as error:
        return str(error), 2
    failed = any(row["breaches"] for row in rows) or not all(result["noticed"] for result in results)
    if args.json:
        text = json.dumps({"kernels": rows, "mistakes": results} if args.self_test else rows, indent=1)
    else:
        text = "\n\n".join([check_text(rows), self_test_text(results)] if args.self_test else [check_text(rows)])
    return text, 1 if failed else 0


def run(args: argparse.Namespace) -> tuple[Rows, Rows]:
    """The verdicts on the kernels and those on the mistakes, which are none without the self-test."""
    if importlib.util.find_spec("triton") is None:
        raise CannotCheckError("triton is not installed, without which there are no kernels; it has wheels for Linux.")
    from kernels.check import compile

    compile.require_compiler()
    from kernels.check import mutations, table

    if not table.cases(args.only) and not (args.self_test and mutations.chosen(args.only)):
        kinds = {"configuration": {case.name.partition(",")[0] for case in table.cases()}}
        if args.self_test:
            kinds["mistake"] = {mutation.mistake for mutation in mutations.MUTATIONS}
        known = [
            f"No {kind} has {args.only!r} in its name; there are {', '.join(sorted(kinds[kind]))}." for kind in kinds
        ]
        raise CannotCheckError(" ".join(known))
    job = functools.partial(mutations.check_all, only=args.only, self_test=args.self_test)
    found = on_each(job, [ARCHES[name] for name in args.arch])
    rows, results = ([row._asdict() for part in parts for row in part] for parts in zip(*found, strict=True))
    return rows, results


def on_each(job: Callable[[int], Any], arches: list[int]) -> list[Any]:
    """What `job` returns for each architecture, each in a process of its own: Triton keeps one target per process."""
    with tempfile.TemporaryDirectory() as folder:
        # Kernels compiled earlier, maybe by another version, are no evidence.
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(len(arches), multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(job, arches))


COLUMNS = {
    "kernel": "kernel", "arch": "arch", "dtype": "dtype", "tile": "tile", "regs": "registers", "smem KB": "shared_kb",
    "occ": "occupancy", "mma": "mma", "instr": "instructions", "issue": "issue", "smem": "shared_ratio",
    "depth": "depth", "flight KB": "in_flight_kb",
}  # fmt: skip


def check_text(rows: list[dict[str, Any]]) -> str:
    lines = [[*COLUMNS, "verdict"]]
    lines += [[cell(row[name]) for name in COLUMNS.values()] + [", ".join(row["breaches"]) or "ok"] for row in rows]
    said = [
        f"{row['kernel']}, {row['arch']}, {row['tile']} ({row['cases'][0]}): {rule}: {how}."
        for row in rows
        for rule, how in row["breaches"].items()
    ]
    broken = sum(bool(row["breaches"]) for row in rows)
    return "\n".join([aligned(lines), "", *said, f"{broken} of {len(rows)} kernels break a rule."])


def self_test_text(rows: list[dict[str, Any]]) -> str:
    lines = [["mistake", "arch", "kernel", "rule", "verdict", "all that it breaks"]]
    for row in rows:
        verdict = "noticed" if row["noticed"] else "MISSED"
        lines.append([row["mistake"], row["arch"], row["kernel"], row["rule"], verdict, ", ".join(row["breaks"])])
    noticed = sum(row["noticed"] for row in rows)
    return f"{aligned(lines)}\n\n{noticed} of {len(rows)} mistakes break the rule that they should."


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}".removesuffix(".00") if isinstance(value, float) else str(value)


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    said, status = main(sys.argv[1:])
    print(said, file=sys.stderr if status == 2 else sys.stdout)
    sys.exit(status)
