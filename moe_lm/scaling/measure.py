"""The hardware sheet of this machine, measured now, and what it reaches of its own peaks."""

import os
from datetime import date
from pathlib import Path

import torch

from moe_lm.bench import machine as bench
from moe_lm.config import ConfigError
from moe_lm.scaling.constants import OUR_ATTENTION
from moe_lm.scaling.hardware import Hardware, Machine, Measured, PeakFlops, machine_of, sheet_toml

LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
"""Where Linux tells the size of the last cache, as 32768K."""


def measured_machine(path: str = "") -> Machine:
    """This machine's processor as the cost model sees it; written to `path` as a sheet, too, unless that is empty.

    Raises ConfigError where it cannot be written.
    """
    device = torch.device("cpu")
    rates = {dtype: bench.gemm_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    fast = bench.fastest_dtype(device)
    products = bench.product_rate(device, fast)
    rates[fast] = max(rates[fast], products)  # measured at different moments
    bandwidth = bench.read_bandwidth(device)
    sheet = Hardware(
        name=bench.describe(device),
        family="cpu",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=bandwidth,
        units=torch.get_num_threads(),
        l2_bytes=int(LAST_CACHE.read_text().rstrip("K\n")) << 10 if LAST_CACHE.exists() else 0,
        peak_flops=PeakFlops(float32=rates[torch.float32], bfloat16=rates[torch.bfloat16]),
        gpus_per_node=1, nvlink=bandwidth, network=bandwidth, nvlink_latency=0.0, network_latency=0.0,
        price=0.0, power=0.0,
        measured=Measured(
            gemm=products / rates[fast],
            attention=OUR_ATTENTION * bench.attention_rate(device, fast) / rates[fast],
            passes=bandwidth / bench.elementwise_bandwidth(device, fast),
            launch=bench.call_seconds(device),
        ),
    )  # fmt: skip
    if path:
        text = sheet_toml(sheet, f"measured by moe_lm.scaling --measure on {date.today()}")
        try:
            Path(path).write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"--measure {path} cannot be written: {error.strerror}.") from None
    return machine_of(sheet)
