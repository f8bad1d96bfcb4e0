"""What good machine code looks like: one function per rule, one row of limits per kind of kernel and architecture.

The limits come from kernels of this kind that are known to be fast and from what their mistakes look like in machine
code; `mutations` makes the mistakes on purpose. A rule returns what is wrong, or None.

A step is what a kernel's source does in one iteration of its main loop; the compiler may put several into one trip.
"""

from collections.abc import Callable
from typing import NamedTuple

from kernels.check.sass import Body

KB = 1024
WIDE = 16
"""The most bytes that one thread moves at a time."""


class Chip(NamedTuple):
    """One streaming multiprocessor, from NVIDIA's tuning guides for Ampere and Hopper."""

    tensor_flops: int
    """16-bit operations per clock."""
    shared: int
    """Bytes of shared memory, of which every program takes one KB more than it asks for."""
    shared_rate: int = 128
    """Bytes per clock."""
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    issues: int = 4
    """Instructions per clock, one of each quarter."""


CHIPS = {80: Chip(2048, 164 * KB), 90: Chip(4096, 228 * KB)}


class Limits(NamedTuple):
    """For one kind of kernel on one architecture; None where a rule does not apply."""

    mma: str
    """The tensor instruction of the main loop."""
    issue: float | None = None
    """Clocks that issuing takes, as a share of those that the tensor cores take."""
    shared: float | None = None
    """The same of shared memory's."""
    in_flight_kb: float | None = None
    """Bytes on their way to one multiprocessor. Little's law asks for 11 KB (A100) and 18 KB (H100) at a latency of 600
    and 700 ns; these are 2.2 times that."""
    pure: bool = False
    """Whether the main loop does nothing but multiply: no shuffles, no transcendental functions, no exchange of
    registers through shared memory."""
    mma_overlap: bool = False
    """Whether a warpgroup's product must be in flight over the end of an iteration."""


LIMITS = {
    ("gemm", 80): Limits("HMMA", 0.33, 1.02, pure=True),
    ("gemm", 90): Limits("HGMMA", 0.30, 1.02, pure=True, mma_overlap=True),
    ("halves", 80): Limits("HMMA", pure=True),
    ("halves", 90): Limits("HGMMA", pure=True, mma_overlap=True),
    ("wgrad", 80): Limits("HMMA", 0.36, 1.02, pure=True),
    ("wgrad", 90): Limits("HGMMA", 0.30, 1.02, pure=True, mma_overlap=True),
    ("decode", 80): Limits("HMMA", in_flight_kb=24, pure=True),
    ("decode", 90): Limits("HGMMA", in_flight_kb=40, pure=True, mma_overlap=True),
    ("attention", 80): Limits("HMMA", in_flight_kb=24),
    ("attention", 90): Limits("HGMMA", in_flight_kb=40),
}


class Spec(NamedTuple):
    """What a kernel's source says of one launch."""

    kind: str
    """gemm, wgrad, decode or attention; `halves` is a gemm's last round; a `stream` moves rows without products, and a
    `small` one hardly anything: it is held to the rules on resources."""
    flops: int = 0
    """Tensor operations of one step."""
    bytes: int = 0
    """Copied from global to shared memory in one step."""
    rows: int = 64
    """Of the left operand: fewer than 64 cannot use a warpgroup's tensor instruction."""
    programs: int | None = None
    """That a persistent launch gives each multiprocessor, to be held at once; None where there are as many as tiles."""
    width: int = WIDE
    """Bytes that a thread should move at a time."""
    narrow_loads: int = 0
    """Loads that may be narrower: of indices in a main loop, of scalars in a stream."""
    narrow_stores: int = 0
    """Stores that may be narrower: of one number a row, as the sums of an attention's weights."""
    halves: bool = False
    """Whether a second loop computes a step in two halves, as the last round of tiles."""


class Kernel(NamedTuple):
    """A compiled kernel as the rules see it."""

    name: str
    arch: int
    dtype: str
    """As torch names it."""
    warps: int
    spec: Spec
    registers: int
    shared: int
    stack: int
    local: int
    specialised: bool
    """Whether its source asks for warp specialisation."""
    whole: Body | None
    """All of it; None where rules look at resources alone."""
    loops: list[Body]
    """Those with tensor instructions, the main loop first."""

    @property
    def body(self) -> Body | None:
        """The main loop."""
        return self.loops[0] if self.loops else None

    @property
    def second(self) -> "Kernel":
        """With the loop of the last round as its main loop. Half of the columns, and all of the rows, are copied for
        half of the work; its shared memory is the main loop's."""
        spec = self.spec._replace(kind="halves", flops=self.spec.flops // 2, halves=False)
        return self._replace(spec=spec, loops=self.loops[1:])

    @property
    def chip(self) -> Chip:
        return CHIPS[self.arch]

    @property
    def limits(self) -> Limits | None:
        """None where the rules on loops do not hold: there are no products, or none in 16 bits."""
        return LIMITS.get((self.spec.kind, self.arch)) if self.dtype != "float32" else None

    @property
    def occupancy(self) -> int:
        """Programs that one multiprocessor holds. A warp gets registers in pieces of 256."""
        chip = self.chip
        by_registers = chip.registers // (-(-self.registers * 32 // 256) * 256 * self.warps)
        by_shared = chip.shared // (self.shared + KB)
        return min(by_registers, by_shared, chip.warps // self.warps, chip.programs)

    @property
    def steps(self) -> float:
        """Steps in one trip through the main loop."""
        return self.body.flops * self.warps / self.spec.flops

    @property
    def tensor_clocks(self) -> float:
        return self.body.flops * self.warps / self.chip.tensor_flops

    @property
    def issue(self) -> float:
        return self.body.instructions * self.warps / self.chip.issues / self.tensor_clocks

    @property
    def shared_ratio(self) -> float:
        moved = self.body.shared_bytes * self.warps + self.spec.bytes * self.steps
        return moved / self.chip.shared_rate / self.tensor_clocks

    @property
    def depth(self) -> int:
        """Steps that are being copied while one is computed."""
        bounds = []
        if self.body.commits:
            bounds.append(int((self.body.wait or 0) // (self.body.commits / max(1, self.steps))))
        if self.body.tma:
            bounds.append(self.shared // self.spec.bytes - 1)
        return min(bounds, default=0)

    @property
    def in_flight_kb(self) -> float:
        held = min(self.occupancy, self.spec.programs or self.occupancy)
        return held * self.depth * self.spec.bytes / KB


def spill(k: Kernel) -> str | None:
    moves = sum(k.whole.others.get(name, 0) for name in ("STL", "LDL")) if k.whole else 0
    if moves or k.stack or k.local:
        where = f", moved {moves} times" if moves else ""
        return f"{k.stack + k.local} bytes of local memory per thread{where}"
    return None


def smem(k: Kernel) -> str | None:
    most = k.chip.shared // KB - 1
    return f"{k.shared / KB:.0f} KB of shared memory, of {most}" if k.shared > most * KB else None


def occupancy(k: Kernel) -> str | None:
    held, asked = k.occupancy, k.spec.programs or 1
    return f"a multiprocessor holds {held} programs, of {asked} launched for it" if held < asked else None


def no_loop(k: Kernel) -> str | None:
    return None if k.body else "no loop with tensor instructions"


def mma_kind(k: Kernel) -> str | None:
    wanted = "HMMA" if k.spec.kind == "attention" and k.spec.rows < 64 else k.limits.mma
    return f"{'+'.join(sorted(k.body.mma))}, not {wanted}" if k.body.mma != {wanted} else None


def mma_dtype(k: Kernel) -> str | None:
    wanted = {"bfloat16": "BF16", "float16": "F16"}[k.dtype]
    return f"products in {'+'.join(sorted(k.body.dtypes))}, not {wanted}" if k.body.dtypes != {wanted} else None


def loop_flops(k: Kernel) -> str | None:
    if k.steps >= 1 and k.steps == int(k.steps):
        return None
    return f"{k.body.flops * k.warps} tensor operations per trip, of {k.spec.flops} per step"


def sync_ldg(k: Kernel) -> str | None:
    loads = sum(k.body.loads.values())
    return f"{loads} loads wait for memory in the loop" if loads > k.spec.narrow_loads * k.steps else None


def no_async(k: Kernel) -> str | None:
    return None if k.body.copies or k.body.tma else "nothing is copied asynchronously in the loop"


def load_width(k: Kernel) -> str | None:
    body = k.body if k.limits else k.whole
    narrow = [f"{n} of {width} B" for width, n in (*body.loads.items(), *body.copies.items()) if width < k.spec.width]
    count = sum(n for width, n in (*body.loads.items(), *body.copies.items()) if width < k.spec.width)
    allowed = k.spec.narrow_loads * (k.steps if k.limits else 1)
    return f"narrow loads: {', '.join(narrow)}" if count > allowed else None


def depth(k: Kernel) -> str | None:
    return "no step is copied while another is computed" if k.depth < 1 else None


def wgmma_sync(k: Kernel) -> str | None:
    if not k.limits.mma_overlap or "HGMMA" not in k.body.mma or (k.body.mma_wait or 0) >= 1:
        return None
    return "every step waits for its own product"


def issue(k: Kernel) -> str | None:
    most = k.limits.issue
    return f"issues for {k.issue:.2f} of the tensor time, of {most}" if most and k.issue > most else None


def smem_bandwidth(k: Kernel) -> str | None:
    most, ratio = k.limits.shared, k.shared_ratio
    return f"shared memory is busy for {ratio:.2f} of the tensor time, of {most}" if most and ratio > most else None


def loop_junk(k: Kernel) -> str | None:
    found = {name: k.body.others[name] for name in ("SHFL", "MUFU", "LDS") if name in k.body.others}
    return f"{found} in the loop" if found and k.limits.pure else None


def store_width(k: Kernel) -> str | None:
    narrow = {f"{width} B": n for width, n in k.whole.stores.items() if width < k.spec.width}
    return f"narrow stores: {narrow}" if sum(narrow.values()) > k.spec.narrow_stores else None


def specialisation_dropped(k: Kernel) -> str | None:
    if k.specialised and "USETMAXREG" not in k.whole.others:
        return "asks for warp specialisation and does not get it"
    return None


def in_flight(k: Kernel) -> str | None:
    least = k.limits.in_flight_kb
    return f"{k.in_flight_kb:.0f} KB in flight, of {least} asked" if least and k.in_flight_kb < least else None


Rule = Callable[[Kernel], str | None]

ALWAYS: dict[str, Rule] = {"SPILL": spill, "SMEM": smem, "OCC": occupancy}
"""Rules on resources, of every kernel."""

WIDTHS: dict[str, Rule] = {"LOAD_WIDTH": load_width, "STORE_WIDTH": store_width}
"""Of every kernel that moves data."""

LOOPS: dict[str, Rule] = {
    "MMA_KIND": mma_kind, "MMA_DTYPE": mma_dtype, "LOOP_FLOPS": loop_flops, "SYNC_LDG": sync_ldg,
    "NO_ASYNC": no_async, "DEPTH": depth, "WGMMA_SYNC": wgmma_sync, "ISSUE": issue, "SMEM_BW": smem_bandwidth,
    "LOOP_JUNK": loop_junk, "WS_DROPPED": specialisation_dropped, "INFLIGHT_KB": in_flight,
}  # fmt: skip
"""Of kernels with products in 16 bits."""


def needs_code(spec: Spec, dtype: str) -> bool:
    """Whether any rule looks at more than resources."""
    return spec.kind != "small" and dtype != "float32"


def breaches(k: Kernel) -> dict[str, str]:
    """The rules that a kernel breaks, and how."""
    rules = ALWAYS
    if needs_code(k.spec, k.dtype):
        rules = rules | WIDTHS
    if k.limits is not None:
        # Without a main loop there is nothing that the other rules could look at.
        rules = rules | LOOPS if k.body else ALWAYS | {"NO_LOOP": no_loop}
    found = {name: said for name, rule in rules.items() if (said := rule(k))}
    if k.spec.halves and k.limits is not None and k.body:
        found = {name: f"in the last round, {said}" for name, said in breaches(k.second).items()} | found
    return found
