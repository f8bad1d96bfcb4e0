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
READ_BYTES = {"cpu": (1 << 26, 1 << 28), "cuda": (1 << 30, 1 << 32)}
"""Buffers well beyond the last cache level of a core, and beyond most shared ones."""


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
    """Bytes per second of summing a buffer, the better of two sizes."""
    rates = []
    for size in READ_BYTES[device.type]:
        buffer = torch.ones(size // 4, device=device)
        rates.append(size / median_seconds(buffer.sum, device))
    return max(rates)


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
