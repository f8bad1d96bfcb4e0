"""What this machine can do, measured: GEMM rate by dtype and read bandwidth. The ceilings of every fraction we print.

    python -m moe_lm.bench.machine [--device cpu|cuda]

Each figure is the best over several sizes of the median over repetitions, once per process: other work on the machine
lowers a median, never raises it.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

GEMM_SIZES = {"cpu": ((512, 256, 1024), (1024, 1024, 1024), (2048, 2048, 2048)), "cuda": ((4096,) * 3, (8192,) * 3)}
"""Rows, inner size and columns; on a CPU from one expert's GEMM in the nano model to a large one."""
READ_BYTES = {"cpu": (1 << 29,), "cuda": (1 << 30, 1 << 32)}
"""Buffers far beyond the last cache: 64 MiB beside one of 32 MiB read a quarter too fast."""


def median_seconds(run: Callable[[], object], device: torch.device, seconds: float = 0.15) -> float:
    """Median duration of `run` over repetitions of `seconds` in all, at least 5, after two that do not count."""
    run(), run()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of several medians, for what has but one size: other work on the machine only lengthens them."""
    return min(median_seconds(run, device, 0.05) for _ in range(5))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several matrix products in `dtype`."""
    rates = []
    for m, k, n in GEMM_SIZES[device.type]:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        rates.append(2 * m * k * n / median_seconds(lambda a=a, b=b: a @ b.t(), device))
    return max(rates)


@functools.cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of summing a buffer, the best of READ_BYTES."""
    rates = []
    for size in READ_BYTES[device.type]:
        buffer = torch.ones(size // 4, device=device)
        rates.append(size / median_seconds(buffer.sum, device))
    return max(rates)


@functools.cache
def cached_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second of summing a buffer of `nbytes`, which the last cache holds, again and again."""
    buffer = torch.ones(nbytes // 4, device=device)
    return nbytes / best_seconds(buffer.sum, device)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s over a linear map's three products in training: its output, the gradients of its input and weight.

    The harmonic mean over maps of a small model: 2,048 tokens, widths of 256 and 1,024.
    """
    seconds = flops = 0.0
    for n, k in ((1024, 256), (256, 1024), (256, 256)):
        x, w, y = (torch.randn(size, device=device).to(dtype) for size in ((2048, k), (n, k), (2048, n)))
        for run in (lambda x=x, w=w: x @ w.t(), lambda y=y, w=w: y @ w, lambda x=x, y=y: y.t() @ x):
            seconds += best_seconds(run, device)
            flops += 2 * 2048 * n * k
    return flops / seconds


@functools.cache
def elementwise_bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of a gate, silu(x) * y over (2048, 1024), forward and backward, each operand counted once."""
    x, y = (torch.randn(2048, 1024, device=device).to(dtype).requires_grad_() for _ in range(2))
    gradient = torch.randn_like(x)

    def run() -> None:
        (torch.nn.functional.silu(x) * y).backward(gradient)

    return 8 * x.numel() * x.element_size() / best_seconds(run, device)


@functools.cache
def call_seconds(device: torch.device) -> float:
    """Seconds of an operation on one number, with what autograd notes of it."""
    x = torch.ones(1, device=device, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(100):
            y = y * x

    return best_seconds(run, device) / 100


def forget() -> None:
    """Measure anew from here on: a shared machine is not as fast as it was a minute ago."""
    for measure in (gemm_rate, read_bandwidth, cached_bandwidth, product_rate, elementwise_bandwidth, call_seconds):
        measure.cache_clear()


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return max((torch.bfloat16, torch.float32), key=lambda dtype: gemm_rate(device, dtype))


def describe(device: torch.device) -> str:
    """The device in words: its name, and its cores or memory."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {capability}"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    device = torch.device(parser.parse_args().device)
    print(describe(device))
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{str(dtype).removeprefix('torch.'):>9} GEMM  {gemm_rate(device, dtype) / 1e9:8.0f} GFLOP/s")
    print(f"         read  {read_bandwidth(device) / 1e9:8.1f} GB/s")


if __name__ == "__main__":
    main()
