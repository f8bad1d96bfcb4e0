"""Every number that the predictions rest on, with its source. What nobody measured says so.

H100 is calibrated on two published GEMMs (CALIBRATION); A100 takes its two fitted rates scaled, and is not validated.
Rates are per clock of one streaming multiprocessor (SM) where nothing else is said; GB and TB are powers of ten.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU as the model sees it."""

    name: str
    arch: int
    """Compute capability as one number."""
    sms: int
    clock: float
    """Hz under matrix load, below the boost clock that the peak is quoted at."""
    flop_per_clock: int
    """Dense bfloat16 tensor FLOP."""
    peak_flops: float
    """Dense bfloat16 FLOP/s of the data sheet: what fractions of peak are of."""
    best_gemm: float
    """FLOP/s of the fastest GEMM that anyone published: tensor cores are taken to run no faster."""
    bandwidth: float
    """Bytes/s of the data sheet."""
    l2_bytes: int
    l2_read: float
    """Bytes per clock that an SM reads from L2 while all do."""
    l2_write: float
    """Bytes per clock that an SM stores."""
    fill: int
    """Clocks until the first tile of a pipeline has arrived."""
    shared_bytes: int
    """Shared memory of an SM, for programs; each takes another KiB."""


# SMs, peaks, bandwidths and sizes: NVIDIA's data sheets and white papers of the A100 80GB SXM, H100 SXM5 and H200 SXM.
# Clock, l2_read and fill: of H100 (1.70 GHz, 32 B, 1500) fitted to CALIBRATION, of A100 (1.35 GHz, 26 B, 1200) scaled.
# l2_write of H100: fitted here to the second point of CALIBRATION; of A100: the same share of its l2_read, a guess.
# best_gemm: the table "Maximum Achievable Matmul FLOPS" of github.com/stas00/ml-engineering, compute/accelerator (A100
# SXM 271.2 TFLOP/s with torch 2.6, H100 SXM 794.5 with 2.7). It is cuBLAS, tails included, so a little pessimistic.
# shared_bytes: CUDA C++ Programming Guide, table of technical specifications per compute capability.
H100 = Gpu(
    "H100 SXM", 90, 132, 1.70e9, 4096, 989.4e12, 794.5e12, 3.35e12, 50 << 20, 32.0, 21.0, 1500, 228 << 10,
)  # fmt: skip
A100 = Gpu(
    "A100 SXM 80GB", 80, 108, 1.35e9, 2048, 312e12, 271.2e12, 2.039e12, 40 << 20, 26.0, 17.0, 1200, 164 << 10,
)  # fmt: skip
H200 = H100._replace(name="H200 SXM", bandwidth=4.8e12)
GPUS = {"a100": A100, "h100": H100, "h200": H200}

HBM_SHARE = 0.85
"""Share of the data sheet's bandwidth that a kernel reaches. Assumed: vLLM's tuned mixture comes to 0.81 of an H200,
launches included (vllm-project/vllm#44818)."""

SHARED_BYTES_PER_CLOCK = 128
"""Of an SM: 32 banks of 4 bytes (CUDA C++ Programming Guide)."""

SCHEDULERS = 4
"""Warp instructions that an SM issues per clock, one for each quarter."""

LAUNCH = 1e-6
"""Seconds between the end of a kernel and the start of the next in a stream or a graph. An assumption: nothing that we
could read again gives it for these GPUs."""

MEMORY_LATENCY = {80: 600e-9, 90: 700e-9}
"""Seconds from a load to its data under load (docs/kernels.md, Machine code): what bytes in flight are divided by."""

INSTRUCTIONS: dict[tuple[int, str, int, int, int], int] = {
    (80, "gemm", 128, 256, 8): 257,
    (80, "gemm", 128, 128, 8): 158,
    (80, "gemm", 64, 128, 4): 178,
    (80, "wgrad", 128, 256, 8): 244,
    (80, "decode", 16, 128, 4): 110,
    (80, "decode", 32, 128, 4): 129,
    (80, "decode", 64, 128, 4): 167,
    (80, "attention", 32, 64, 4): 514,
    (80, "attention int8", 32, 64, 4): 1239,
    (90, "gemm", 128, 256, 8): 99,
    (90, "gemm", 128, 128, 8): 91,
    (90, "gemm", 64, 256, 4): 95,
    (90, "wgrad", 128, 256, 8): 88,
    (90, "decode", 16, 128, 4): 97,
    (90, "decode", 32, 128, 4): 99,
    (90, "decode", 64, 128, 4): 113,
    (90, "attention", 64, 64, 4): 539,
    (90, "attention int8", 64, 64, 4): 830,
}
"""Instructions that a warp issues in a step of 64 elements, of attention 64 keys of 128 channels: (architecture, kind,
block_m, block_n, warps). Read from the machine code of the shipped kernels by kernels.check (bfloat16, Triton 3.7.1,
2,048 x 4,096), the larger where two kernels share a tile. Trial kernels had 237 to 262 and 115 to 124 for the
tile of 128 x 256."""

UNLISTED_INSTRUCTIONS = 1.7
"""For a tile that is not listed: instructions for each matrix instruction, shared load and asynchronous copy together.
Trial kernels on sm_80 had 1.4 to 1.7."""

WIDENED_BYTES = {80: 1.5, 90: 4.0}
"""Bytes of shared memory traffic to make bfloat16 of an int8 key or value, counted in the machine code of the shipped
kernels: on sm_80 values alone go through shared memory again."""


class Published(NamedTuple):
    """One measurement by others that the model can be held to."""

    what: str
    source: str
    gpu: str
    unit: str
    value: float


CALIBRATION = (
    Published(
        "GEMM 65536 x 1024 x 1024, stores hidden behind the next tile",
        "github.com/facebookexperimental/triton/pull/1038, persistent and warp-specialised",
        "h100", "TFLOP/s", 564.3,
    ),
    Published(
        "GEMM 65536 x 1024 x 1024",
        "github.com/facebookexperimental/triton/pull/1038, before",
        "h100", "TFLOP/s", 502.3,
    ),
)  # fmt: skip
"""What `fill` and `l2_write` of H100 were fitted to."""

VALIDATION = (
    Published(
        "fused mixture, 128 experts of 2048 x 768, top 8, 32768 tokens",
        "github.com/linkedin/Liger-Kernel/pull/1294, inference",
        "h100", "TFLOP/s", 523.0,
    ),
    Published(
        "fused mixture, 128 experts of 2816 x 704, top 8, 64 tokens",
        "github.com/vllm-project/vllm/pull/44818, tuned",
        "h200", "us", 384.1,
    ),
    Published(
        "fused mixture, 128 experts of 2816 x 704, top 8, 4096 tokens",
        "github.com/vllm-project/vllm/pull/44818, tuned",
        "h200", "us", 1189.6,
    ),
)  # fmt: skip
"""What nothing was fitted to."""
