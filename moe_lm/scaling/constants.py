"""Every number that predictions rest on beside the hardware sheets, with its source; what is fitted says on what."""

from typing import NamedTuple


class Efficiency(NamedTuple):
    """What a device reaches of its sheet, and what training software makes of it."""

    gemm: float
    """Share of the peak FLOP/s that a large product reaches."""
    bandwidth: float
    """Share of the bandwidth that a streaming kernel reaches."""
    attention: float
    """Share of the peak FLOP/s that fused attention reaches."""
    launch: float
    """Seconds between one kernel and the next."""
    links: float
    """Share of the links' bytes/s that a large collective reaches inside a node."""
    network: float
    """Share of the network's bytes/s that a large collective reaches between nodes."""
    passes: float
    """Bytes that training's norms, activations and residuals move, as a multiple of one fused kernel for each."""
    overlap: float
    """Share of the traffic between replicas that hides behind computation, as long as there is some beside it."""
    imbalance: float
    """Tokens of the fullest expert-parallel rank as a multiple of the mean."""
    grouped: float = 1.0
    """Share of a large product's rate that experts' products reach, beside what tiles and waves waste."""
    loss: float = 1.0
    """Bytes that the loss moves, as a multiple of what output_work counts."""
    cached: float = 1.0
    """Bytes/s out of the last cache, as a multiple of the bandwidth; counted on processors alone."""


FITTED = {"training": ("gemm", "passes"), "decode": ("bandwidth",)}
"""The constants that were fitted, to the least mean error of the logarithm: on the training runs of published.toml."""

# Largest products: A100 271 of 312 TFLOP/s, H100 795 of 989 (github.com/stas00/ml-engineering, maximum achievable
# matmul FLOPS); fitted is what a training run's mean is, for clocks fall under its load.
# Passes, fitted: PyTorch's own RMSNorm takes 3.7 times as long as a fused one (0.78 against 2.89 TB/s on H100); the fit
# also takes up what is not modelled, such as gaps while Python launches the next kernel, which weigh more on H100.
# Streams: copies on H100 reach 0.90 to 0.92; gpt-fast's authors found 1.7 of 2.04 TB/s on A100.
# Attention, forward and backward: FlashAttention-2 reaches 0.63 to 0.73 and 0.50 to 0.63 of A100's peak (Dao 2023), and
# 0.35 of H100's; FlashAttention-3 0.75 and 0.55 (Shah et al. 2024). H100's figure here is between the two.
# Launch: 2.1 us on a stream of H100, and the gap of a short kernel's start and end.
# Links: all-reduce moves 235 of 300 GB/s on 8 A100, 367 of 450 on 8 H100 without switches that add.
# Network: 24 of 25 GB/s at best (NCCL's authors), 20 as a rule; H200 on 248 nodes 350 of 400 GB/s.
# Overlap: none in Megatron-LM until 2022, nearly all in FSDP; an assumption in between.
# Imbalance: an assumption for training with a balancing loss; Switch Transformer's capacity factors are 1 to 1.25.
# Of a processor what --measure measures counts (hardware.Measured); these are 2 cores of a Xeon with AMX, where experts
# of 128 columns reached a sixth of the rate of large products, and every pass over fresh float32 logits faulted their
# pages in.
EFFICIENCY = {
    "a100": Efficiency(0.70, 0.85, 0.58, launch=3e-6, links=0.78, network=0.80, passes=2.8, overlap=0.7, imbalance=1.1),
    "h100": Efficiency(0.74, 0.90, 0.45, launch=3e-6, links=0.80, network=0.85, passes=6.5, overlap=0.7, imbalance=1.1),
    "cpu": Efficiency(
        1.0,
        1.0,
        0.15,
        launch=6e-6,
        links=1.0,
        network=1.0,
        passes=4.0,
        overlap=0.0,
        imbalance=1.0,
        grouped=0.18,
        loss=6.0,
    ),
}

SPREAD = {
    "gemm": (0.9, 1.1),
    "bandwidth": (0.9, 1.05),
    "attention": (0.7, 1.3),
    "links": (0.75, 1.15),
    "network": (0.6, 1.15),
    "passes": (0.5, 1.5),
    "overlap": (0.0, 1.35),
    "imbalance": (0.91, 1.2),
}
"""How far each of them may be off, as multiples of it: where the sources above differ; of those that are fitted,
what a family that the fit did not see is off by."""

MODEL_ERROR = {"training": 0.2, "decode": 0.27}
"""How far the model itself is off where nothing was fitted: the third quartile of the errors on published runs whose
family was left out (moe_lm.scaling --validate). It widens low and high beside what the constants do."""


class Reliability(NamedTuple):
    """What a large cluster loses to failures."""

    failures: float
    """Interruptions per GPU and hour."""
    restart: float
    """Seconds from a failure until the run is where its last checkpoint was."""
    storage: float
    """Bytes/s per GPU at which checkpoints are written."""


# Failures: Llama 3, 419 in 54 days on 16,384 H100, 2.0e-5 (Grattafiori et al. 2024, section 3.3.4); BLOOM, 1 to 2 a
# week on 384 A100, 2.3e-5; OPT, about 105 in two months on 992 A100, 7.4e-5 (Zhang et al. 2022, section 2.5).
# Restart: MegaScale detects within 10 minutes and catches up within 15 (Jiang et al. 2024, section 6.3); Llama 3 kept
# more than 90% of its time at a failure every 3.1 hours, so 14 minutes at most beside lost work; by hand 1 to 2 hours.
# Storage: Llama 3, 2 TB/s sustained for 16,384 GPUs; Narayanan et al. 2021, section 5.10, 273 GB/s for 3,072 A100.
RELIABILITY = Reliability(failures=2.3e-5, restart=750, storage=0.1e9)
RELIABILITY_SPREAD = {"failures": (0.87, 3.2), "restart": (0.5, 4.0), "storage": (0.5, 3.0)}

TILE = 128
"""Rows and columns of a tile of a product on a GPU; the last tile of each is padded."""


class Engine(NamedTuple):
    """What an engine adds to the roofline of its kernels when it serves."""

    step: float
    """Seconds of a step in which it schedules and samples and no kernel of the model runs."""
    message: float
    """Seconds of an all-reduce of a few kilobytes over the links of a node, whatever the number of ranks."""
    grouped: bool = True
    """Whether one read of a key-value head serves all query heads that share it."""
    sequence: float = 0.0
    """Seconds of the host for each sequence of a step."""


# Kernels in CUDA graphs. An all-reduce of one or two shots takes 5.7 to 7.8 us up to 32 KB over 8 H100
# (github.com/sgl-project/sglang, issue 2904), NCCL in a graph 16.5 us (issue 10571). TensorRT-LLM up to 0.6 read keys
# and values once for each query head: its blog on the H200 tells of the kernel that ended it (XQA, 2.4 times the rate
# of Llama-2-70B). Seconds on the host are judgements: 0.3 to 1 ms of sampling and scheduling now, 5 to 10 ms in 2023;
# those of `cpu` are CALLS.
ENGINES = {
    "gpu": Engine(step=500e-6, message=8e-6),
    "gpt-fast": Engine(step=100e-6, message=16e-6),
    "lmdeploy turbomind 0.1.0a1": Engine(step=500e-6, message=16e-6),
    "TensorRT-LLM 0.5.0": Engine(step=500e-6, message=16e-6, grouped=False),
    "TensorRT-LLM 0.6.1": Engine(step=500e-6, message=16e-6, grouped=False),
    "FasterTransformer (Triton)": Engine(step=500e-6, message=16e-6),
    "vLLM (2023)": Engine(step=7.5e-3, message=16e-6),
    "vLLM 0.2 (CUDA graphs, NCCL all-reduce)": Engine(step=7.5e-3, message=16e-6),
    "vLLM 0.2 (CUDA graphs, custom all-reduce)": Engine(step=7.5e-3, message=8e-6),
}
"""By what serves: `gpu` is what plans assume, the others are those of published runs."""


class Calls(NamedTuple):
    """What our engine does on a processor between passes of the model, in calls of an operation (`launch`)."""

    step: float
    sequence: float
    """For each sequence of a step."""
    wait: float
    """Between two operations of a pass, for the thread that is last."""


CALLS = Calls(step=65, sequence=12, wait=0.2)
"""What a step takes beyond its pass was measured at batches of 1 to 16 on 2 cores of an AMD EPYC: 58 and 8 calls for
nano-draft, 60 and 8 for nano-dense, 79 and 16 for a mixture that the caches do not hold. On a Xeon with AMX, which
takes 3.5 times as long for a call, 70 and 17 were fitted. Nano is in none of them. A layer of 32 channels takes our
decoder 3 us on that EPYC, for 9 operations."""

READS = {"a100": 0.90, "h100": 0.80, "cpu": 1.0}
"""Share of a streaming kernel's bandwidth that kernels of decode reach, which are short and have few rows. Fitted to
the decode runs of published.toml where streams reach 0.85 (A100) and 0.90 (H100) of the sheet, to the least mean error
of the logarithm. Products of 64 rows were measured to reach 0.63 to 0.80 of an H800's (DeepGEMM's README, 2025)."""
WIDEN = 4.0
"""Operations at the float32 rate that widen one weight of fewer bits than the products take. Fitted on gpt-fast's
int8 and int4 rates of Llama-2-7B and 70B on one A100 (its README): 3 to 5."""
SKINNY = 16
"""Rows of a tile of a product with few rows: the m16n8k16 instruction of tensor cores (NVIDIA, PTX ISA)."""
SCALE_BITS = {4: 16 / 128, 8: 0.0, 16: 0.0, 32: 0.0}
"""Bits of scales for each weight: at 4 bits 16 for a group of 128 inputs (GPTQ, Frantar et al. 2023); one for each row,
at 8 bits, is left out."""

DRAFT_SHARE = 0.05
"""Seconds of a draft's token as a share of the target's step: at most this in the experiments of Leviathan et al. 2023
(definition 3.7)."""

SERVING_SPREAD = {
    "bandwidth": (0.8, 1.07),
    "gemm": (0.75, 1.1),
    "attention": (0.7, 1.2),
    "launch": (2.0, 0.5),
    "links": (0.6, 1.2),
    "step": (3.0, 0.3),
    "message": (2.5, 0.75),
}
"""What low and high forecasts multiply each constant with, worse first. Whole decode steps read at 0.65 to 0.75 of the
bandwidth on A100 and copies at 0.90; large products reach 0.56 to 0.87 of the peak; a launch takes 1.3 us in a graph,
3.8 us without; NCCL may reduce in place of one shot. The widths are judgements from these measurements."""

ADAMW_BYTES = 30
"""AdamW reads gradient, master weight and two moments and writes all but the first, in float32, and the weight in 16
bit."""
GRADIENT_PASSES = 4
"""Bytes of each gradient that the norm before the step reads and its zeroing after it writes."""
CAST_BYTES = 12
"""Our trainer on a processor rounds each float32 weight to 16 bit in the forward, and widens its gradient."""
MUON_BYTES = 60
"""Muon's momentum, look-ahead, cast, norm and update pass over float32 and 16-bit copies of a weight as often."""
NEWTON_SCHULZ_STEPS = 5
"""Of the orthogonalisation (Jordan et al. 2024)."""

CHECKPOINT_BYTES = 14
"""Bytes of a weight in a checkpoint: itself in 16 bit, its float32 master and AdamW's two moments (BLOOM: 2.3 TB)."""

GRADIENT_BYTES = 2
"""Bytes of a gradient where weights have 2: bfloat16, as the 16 bytes per weight of ZeRO (Rajbhandari et al. 2020,
section 3.1) have them. Megatron-LM under bfloat16 sums them in float32, 4 bytes."""

RUNTIME_BYTES = 2.0e9
"""What a process takes of a GPU before its first tensor: CUDA context, kernels and workspaces of libraries, channels of
NCCL. An assumption; a bare context with torch's kernels is about 0.5 GB, and NCCL adds some for each group of ranks."""

FRAGMENTATION = 0.05
"""What the allocator loses on blocks that come and go, as a share of activations. An assumption."""

PREFILL_TOKENS = 2048
"""Most tokens of a prompt in one step of an engine: vLLM's default of max_num_batched_tokens. Sizes its buffers."""
