"""The hardware sheet of this machine, measured now, and what it reaches of its own peaks.

N tokens, D hidden width, F expert width, E experts, K experts per token, V vocabulary, H query heads, C channels of a
head.
"""

import os
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kernels
from kernels.cpu.decoder import Decoder, unavailable
from moe_lm.bench import machine as bench
from moe_lm.config import ConfigError
from moe_lm.scaling.hardware import Hardware, Machine, Measured, PeakFlops, machine_of, sheet_toml

LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
"""Where Linux tells the size of the last cache, as 32768K."""
DEVICE = torch.device("cpu")


def measured_machine(path: str = "") -> Machine:
    """This machine's processor as the cost model sees it; written to `path` as a sheet, too, unless that is empty.

    Raises ConfigError where it cannot be written.
    """
    rates = {dtype: bench.gemm_rate(DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16)}
    fast = bench.fastest_dtype(DEVICE)
    products = bench.product_rate(DEVICE, fast)
    rates[fast] = max(rates[fast], products)  # measured at different moments
    rates[torch.float32] = max(rates[torch.float32], decoder_rate())
    bandwidth, cache = bench.read_bandwidth(DEVICE), last_cache()
    passing = bench.elementwise_bandwidth(DEVICE, fast)
    sheet = Hardware(
        name=bench.describe(DEVICE),
        family="cpu",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=bandwidth,
        units=torch.get_num_threads(),
        l2_bytes=cache,
        peak_flops=PeakFlops(float32=rates[torch.float32], bfloat16=rates[torch.bfloat16]),
        gpus_per_node=1, nvlink=bandwidth, network=bandwidth, nvlink_latency=0.0, network_latency=0.0,
        price=0.0, power=0.0,
        measured=Measured(
            gemm=products / rates[fast],
            attention=attention_rate(fast) / rates[fast],
            passes=bandwidth / passing,
            launch=bench.call_seconds(DEVICE),
            grouped=min(1.0, experts_rate(fast, passing) / products),
            loss=max(1.0, bandwidth / loss_bandwidth(fast, products)),
            cached=max(1.0, bench.cached_bandwidth(DEVICE, cache // 4) / bandwidth) if cache else 1.0,
        ),
    )  # fmt: skip
    if path:
        text = sheet_toml(sheet, f"measured by moe_lm.scaling --measure on {date.today()}")
        try:
            Path(path).write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"--measure {path} cannot be written: {error.strerror}.") from None
    return machine_of(sheet)


def decoder_rate() -> float:
    """FLOP/s in float32 that 15 tokens more cost our decoder which reads its weights for one; 0 where it cannot run.

    Three dense layers, D = 320, F = 640, V = 3,072, H = 5, C = 64. torch's products reach two thirds of it on an EPYC.
    """
    if unavailable():
        return 0.0
    L, D, F, V, H, C, most = 3, 320, 640, 3072, 5, 64, 16
    shapes = {
        "qkv_proj": ((H + 2) * C, D), "o_proj": (D, H * C), "gate_up_proj": (2 * F, D), "down_proj": (D, F),
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    layers = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(L)]
    head = torch.randn(V, D)
    decoder = Decoder(layers, head, torch.ones(D), head, heads=H, kv_heads=1, head_dim=C, top_k=0, eps=1e-5)
    tokens, table, angles = torch.arange(most), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(most, C // 2)
    keys, values = torch.zeros(2, L, 1, most, 1, C)

    def seconds(count: int) -> float:
        ends, ids = torch.tensor([0, count]), tokens[:count]
        cos_sin = angles[:count], angles[:count]
        run = partial(decoder.forward, ids, *cos_sin, ids, table, ends, ends[1:], keys, values, ids)
        return bench.best_seconds(run, DEVICE)

    flops = 2 * (most - 1) * sum(weight.numel() for weight in (head, *(w for own in layers for w in own.values())))
    whole = seconds(most)
    return flops / max(whole - seconds(1), whole / 4)


def last_cache() -> int:
    """Bytes of the last cache; 0 where the system does not tell."""
    return int(LAST_CACHE.read_text().rstrip("K\n")) << 10 if LAST_CACHE.exists() else 0


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def forth_and_back(run: Callable[[], Tensor], *leaves: Tensor) -> float:
    """Seconds of `run` and of its gradients by `leaves`."""
    gradient = torch.ones_like(run())
    return bench.best_seconds(lambda: torch.autograd.grad(run(), leaves, gradient), DEVICE)


def attention_rate(dtype: torch.dtype) -> float:
    """FLOP/s of our causal attention, forward and backward, 8 rows of 256 tokens, 6 heads of 64 on one key head.

    Half of the scores count, and the backward as 2.5 forwards (Dao 2023, section 4).
    """
    B, T, H, C = 8, 256, 6, 64
    q, k, v = leaf(dtype, B, T, H, C), leaf(dtype, B, T, 1, C), leaf(dtype, B, T, 1, C)
    seconds = forth_and_back(lambda: kernels.attention(q, k, v), q, k, v)
    return 3.5 * 4 * B * H * T * T / 2 * C / seconds


def experts_rate(dtype: torch.dtype, passing: float) -> float:
    """FLOP/s of the experts' products, forward and backward, 2,048 tokens, 2 of 16 experts of 320 x 160 each.

    What is neither a product nor counted as one, gathering, gate and weighted sum, goes at `passing` bytes/s.
    """
    N, D, F, E, K = 2048, 320, 160, 16, 2
    x, gate_up, down = leaf(dtype, N, D), leaf(dtype, E, 2 * F, D), leaf(dtype, E, D, F)
    routing = kernels.route(torch.randn(N, E), K)
    seconds = forth_and_back(lambda: kernels.expert_mlp(x, routing, gate_up, down), x, gate_up, down)
    numbers = 8 * N * K * F + 2 * (N + 3 * N * K) * D  # as training_ops.activation and experts_work count them
    flops = 18 * N * K * D * F
    return flops / max(seconds - numbers * dtype.itemsize / passing, seconds / 4)


def loss_bandwidth(dtype: torch.dtype, products: float) -> float:
    """Bytes/s of the passes over logits, forward and backward, 2,048 rows of 320 over a vocabulary of 3,072.

    Its three products go at `products` FLOP/s.
    """
    N, D, V = 2048, 320, 3072
    x, weight = leaf(dtype, N, D), leaf(torch.float32, V, D)
    targets = torch.randint(V, (N,))
    seconds = forth_and_back(lambda: kernels.cross_entropy(x, weight, targets), x, weight)
    return 20 * N * V / max(seconds - 6 * N * D * V / products, seconds / 4)
