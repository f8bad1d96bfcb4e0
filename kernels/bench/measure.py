"""Times of contenders on this device: checked first, then timed in turns, with cold and with warm caches.

Turns, in an order that is reversed every round, spread what else happens to a machine over all contenders alike; a
median with its quartiles says how much is left. Cold means that a buffer several times the last cache was written just
before (as Triton's do_bench does), warm that the contender itself ran just before. On a GPU, events are recorded around
the call, and the GPU is kept busy until the host has queued it, so that Python's time does not count unless the call
itself waits for the device. No CUDA graph is timed: a graph cannot be flushed between its replays, and rotating
buffers instead quietly measures warm when too few are used (flashinfer#4468).
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.bench.ops import Case, Result

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest error as a share of the largest true value, by the dtype of the inputs."""

GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


Samples = dict[str, dict[str, list[float]]]
"""By contender, and then by `cold` and `warm`."""


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """A quarter of the calls took less."""
    high: float
    """A quarter took more."""
    least: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> "Times":
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        return cls(median, low, high, min(samples), len(samples))


class Machine(NamedTuple):
    """What this device was measured to do."""

    name: str
    dtype: str
    gemm: float
    """FLOP/s of the fastest of several square products."""
    copy: float
    """Bytes/s, read and written, of a copy larger than every cache."""
    launch: float
    """Seconds that an operation on one number takes: part of every time that is measured."""


class Flush:
    """Empties the device's caches when called."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(cache_bytes(device) * 2, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


def cache_bytes(device: torch.device) -> int:
    """Size of the last level of cache, and not less than what a GPU or a server's core has."""
    if device.type == "cuda":
        return max(torch.cuda.get_device_properties(device).L2_cache_size, 128 << 20)
    level = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in getattr(os, "sysconf_names", {}) else 0
    return max(level, 32 << 20)


class Stopwatch:
    """Times single calls on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cycles = 0

    def __call__(self, run: Callable[[], object], before: Callable[[], object]) -> float:
        """Seconds of `run`, right after `before`, which does not count."""
        if self.device.type != "cuda":
            before()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        # Clocks of a kernel that does nothing but wait, longer than the host needs to queue the calls.
        torch.cuda._sleep(self.cycles)
        before()
        first.record()
        run()
        last.record()
        queued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        self.cycles = max(self.cycles, int(min(queued, 0.01) * 2e9))
        return first.elapsed_time(last) / 1e3


def alternate(
    contenders: dict[str, Callable[[], object]], device: torch.device, seconds: float, quick: bool = False
) -> Samples:
    """Seconds of single calls of every contender, made in turns for about `seconds`."""
    flush, watch = Flush(device), Stopwatch(device)
    for run in contenders.values():
        run()
        watch(run, flush)
    samples: Samples = {name: {"cold": [], "warm": []} for name in contenders}
    least, most = (3, 3) if quick else (LEAST_ROUNDS, MOST_ROUNDS)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        order = list(contenders.items())
        for name, run in order if rounds % 2 == 0 else reversed(order):
            samples[name]["cold"].append(watch(run, flush))
            samples[name]["warm"].append(watch(run, run))
        rounds += 1
    return samples


def error(got: Result, true: Result) -> float:
    """Largest error of any part of a result as a share of that part's largest true value; inf for a wrong shape."""
    parts = zip(as_tuple(got), as_tuple(true), strict=True)
    return max((part_error(g, t) for g, t in parts), default=0.0)


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def part_error(got: Tensor, true: Tensor) -> float:
    if got.shape != true.shape:
        return float("inf")
    if not true.numel():
        return 0.0
    worst = (got.double() - true.double()).abs().max().item() / max(true.double().abs().max().item(), 1e-30)
    return worst if worst == worst else float("inf")  # NaN is as wrong as can be


def errors(case: Case) -> dict[str, float]:
    """Error of every rival's result against the reference in float32."""
    true = case.exact()
    return {name: error(case.shown(c.run()), true) for name, c in case.contenders.items() if c.rival}


def machine(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Machine:
    """This device's own ceilings: the best product and the copy."""
    rates = []
    for n in GEMM_SIZES[device.type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / best(lambda a=a, b=b: a @ b.t(), device, seconds / 4))
    source = torch.ones(COPY_BYTES[device.type] // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / best(lambda: target.copy_(source), device, seconds / 4)
    number = torch.zeros(1, device=device)
    return Machine(
        describe(device), str(dtype).removeprefix("torch."), max(rates), copied,
        best(number.zero_, device, seconds / 4),
    )  # fmt: skip


def best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of repetitions, at least 3, after one that does not count."""
    watch = Stopwatch(device)
    samples: list[float] = []
    run()
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(watch(run, lambda: None))
    return statistics.median(samples)


def busy() -> str | None:
    """A sentence about other work on this machine's cores, if there is much."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= cores / 2:
        return None
    return f"This machine has other work, a load of {load:.1f} on {cores} cores: times and cliffs may be that work's."


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
