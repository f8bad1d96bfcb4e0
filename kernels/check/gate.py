"""From a recorded launch to the verdict on it, and the verdicts on all shipped configurations."""

from typing import NamedTuple

import torch
import triton

from kernels.check import sass, table
from kernels.check.compile import Build, assume_target, build, machine_code
from kernels.check.rules import KB, Kernel, Spec, breaches, needs_code
from kernels.gpu.launch import Launch, Target

SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "HEADS", "BLOCK_P", "BLOCK_C", "BLOCK_D", "BLOCK")
"""Constants that a tile is named by."""


class Row(NamedTuple):
    """One piece of machine code and what the rules say of it."""

    kernel: str
    arch: str
    """As sm_80."""
    dtype: str
    tile: str
    breaches: dict[str, str]
    """Rules that it breaks, and how."""
    cases: list[str]
    """Configurations that run it."""
    registers: int | None = None
    """This and the rest are None where the kernel does not compile, and those of the main loop where it has none."""
    shared_kb: float | None = None
    occupancy: int | None = None
    mma: str | None = None
    instructions: int | None = None
    """In one trip through the main loop, of one warp."""
    issue: float | None = None
    shared_ratio: float | None = None
    depth: int | None = None
    in_flight_kb: float | None = None


class Compiled(NamedTuple):
    """A launch, what it would run, and what is asked of that."""

    launch: Launch
    built: Build
    spec: Spec
    dtype: torch.dtype

    @property
    def type_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def read(compiled: list[Compiled], gpu: Target) -> list[Kernel]:
    """What the rules look at, of each."""
    code = machine_code({c.built.cubin for c in compiled if needs_code(c.spec, c.type_name)}, gpu.arch)
    return [kernel(c, code.get(c.built.cubin), gpu) for c in compiled]


def kernel(compiled: Compiled, code: str | None, gpu: Target) -> Kernel:
    launch, built, spec, _ = compiled
    flow = sass.parse(code) if code else None
    return Kernel(
        name=table.name_of(launch), arch=gpu.arch, dtype=compiled.type_name, warps=launch.meta.get("num_warps", 4),
        spec=spec, registers=built.registers, shared=built.shared, stack=built.stack, local=built.local,
        specialised=built.specialised, whole=flow and sass.count([i for block in flow.blocks for i in block]),
        loops=sass.product_loops(flow) if flow else [],
    )  # fmt: skip


def row(launch: Launch, kernel: Kernel | str, spec: Spec, dtype: torch.dtype, arch: int, cases: list[str]) -> Row:
    """`kernel` as it was read, or why it does not compile."""
    sizes = "x".join(str(launch.meta[name]) for name in SIZES if name in launch.meta) or "-"
    stages = f" s{launch.meta['num_stages']}" if "num_stages" in launch.meta else ""
    found = Row(
        table.name_of(launch), f"sm_{arch}", "-" if spec.kind == "small" else str(dtype).removeprefix("torch."),
        f"{sizes} w{launch.meta.get('num_warps', 4)}{stages}", {}, cases,
    )  # fmt: skip
    if isinstance(kernel, str):
        return found._replace(breaches={"COMPILE": kernel})
    found = found._replace(
        breaches=breaches(kernel), registers=kernel.registers, shared_kb=kernel.shared / KB, occupancy=kernel.occupancy
    )
    if kernel.limits is None or kernel.body is None:
        return found
    return found._replace(
        mma="+".join(sorted(kernel.body.mma)), instructions=kernel.body.instructions, issue=kernel.issue,
        shared_ratio=kernel.shared_ratio, depth=kernel.depth, in_flight_kb=kernel.in_flight_kb,
    )  # fmt: skip


def check(arch: int, only: str = "") -> list[Row]:
    """The verdicts on the shipped configurations with `only` in their name. For one architecture per process."""
    assume_target(arch)
    gpu = table.GPUS[arch]
    # By machine code and what is asked of it, of which many launches share the same.
    found: dict[tuple[int | str, Spec], tuple[Launch, Build | str, torch.dtype, dict[str, None]]] = {}
    for case in table.cases(only):
        for launch in table.launches(case, gpu):
            spec = table.spec(launch, case.dtype, gpu)
            try:
                built = build(launch)
            except (RuntimeError, triton.TritonError) as error:
                key, built = table.name_of(launch), str(error).strip().rpartition("\n")[2] or type(error).__name__
            else:
                key = id(built)
            found.setdefault((key, spec), (launch, built, case.dtype, {}))[-1][case.name] = None
    kernels = iter(read([
        Compiled(launch, built, spec, dtype)
        for (_, spec), (launch, built, dtype, _) in found.items()
        if isinstance(built, Build)
    ], gpu))  # fmt: skip
    return [
        row(launch, next(kernels) if isinstance(built, Build) else built, spec, dtype, arch, list(names))
        for (_, spec), (launch, built, dtype, names) in found.items()
    ]  # fmt: skip
