"""Seconds that one rank computes and talks for one micro-batch in one layer, forward and backward.

N tokens of a micro-batch, S tokens of a row, D hidden width, F width of an MLP, H query heads, G key-value heads,
C channels of a head, V vocabulary, E experts, K experts per token, I inner width of Mamba; R tensor-parallel ranks.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from moe_lm.config import ModelConfig
from moe_lm.scaling.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from moe_lm.scaling.counts import attention_channels
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.layout import Kind
from moe_lm.scaling.roofline import bounded, gemm, grouped_gemm, stream, width

Seconds = dict[str, float]


@dataclass
class Work:
    """Seconds by part."""

    forward: Counter = field(default_factory=Counter)
    backward: Counter = field(default_factory=Counter)

    def add(self, part: str, forward: float, backward: float) -> None:
        self.forward[part] += forward
        self.backward[part] += backward


class Rank(NamedTuple):
    """One rank at work on a micro-batch: what the seconds of a layer depend on, and nothing else."""

    machine: Machine
    tokens: int
    """N."""
    row: int
    """S."""
    tp: int
    """R."""
    ep: int
    dtype: str
    sequence_parallel: bool
    flash_attention: bool
    recompute: str
    imbalance: float
    """Tokens of the fullest expert-parallel rank as a multiple of the mean."""

    @property
    def norm_tokens(self) -> float:
        """Tokens whose norms and residuals this rank computes: N / R where the sequence is split, too."""
        return self.tokens / self.tp if self.sequence_parallel else self.tokens

    @property
    def numbers(self) -> float:
        """Bytes of a number between the products."""
        return max(2, width(self.dtype))

    @property
    def wide_dtype(self) -> str:
        """Dtype of the products that float8 leaves alone: attention, router and output."""
        return "bfloat16" if self.dtype == "float8" else self.dtype

    def share(self, size: int) -> int:
        """What one of R ranks holds of `size`; at least one."""
        return -(-size // self.tp)


@lru_cache(maxsize=512)
def layer_work(model: ModelConfig, kind: Kind, rank: Rank) -> Work:
    """A layer of the model: parts gemm, experts, attention, elementwise, router, tensor_parallel, expert_all_to_all."""
    work = Work()
    if kind.attends:
        attention_work(work, model, rank)
    else:
        mamba_work(work, model, rank)
    if kind.crosses:
        cross_attention_work(work, model, rank)
    if kind.routes:
        experts_work(work, model, rank)
    else:
        mlp_work(work, model, rank, model.intermediate_size)
        reduced(work, rank, model.hidden_size)
    return work


def linear(work: Work, rank: Rank, rows: float, n: int, k: int) -> None:
    """A matrix (K, N) over `rows`: one product forward; backward one for the inputs and one for the weights.

    In float8 the operands are first cast, and transposed for the backward: read in two bytes, written twice in one.
    """
    machine, dtype = rank.machine, rank.dtype
    back = gemm(machine, rows, k, n, dtype=dtype).seconds + gemm(machine, n, k, rows, dtype=dtype).seconds
    work.add("gemm", gemm(machine, rows, n, k, dtype=dtype).seconds, back)
    if dtype == "float8":
        work.add("elementwise", stream(machine, 4 * rows * k).seconds, stream(machine, 4 * rows * n).seconds)


def passes(work: Work, rank: Rank, forward: float, backward: float, launches: int, part: str = "elementwise") -> None:
    """Kernels that read and write `forward` numbers, and `backward` numbers for their gradients."""
    machine, scale = rank.machine, rank.numbers * rank.machine.reached.passes
    work.add(
        part,
        stream(machine, forward * scale, launches).seconds,
        stream(machine, backward * scale, 2 * launches).seconds,
    )


def norm_and_residual(work: Work, model: ModelConfig, rank: Rank) -> None:
    """A norm (reads x, writes y) and a residual sum (reads both, writes one), and in `gpt2` a dropout with its mask."""
    dropout = 0.5 if model.block == "gpt2" else 0
    size = rank.norm_tokens * model.hidden_size
    passes(work, rank, (5 + dropout) * size, (6 + dropout) * size, 2)


def reduced(work: Work, rank: Rank, columns: int) -> None:
    """The tensor-parallel ranks' outputs are summed, forward those of the block and backward those of its inputs.

    With the sequence split a reduce-scatter after the block and an all-gather before it, else an all-reduce
    (Korthikanti et al. 2022, section 4.2.2): the same bytes.
    """
    nbytes, tp = rank.tokens * columns * rank.numbers, rank.tp
    if rank.sequence_parallel:
        seconds = reduce_scatter(rank.machine, nbytes, tp) + all_gather(rank.machine, nbytes, tp)
    else:
        seconds = all_reduce(rank.machine, nbytes, tp)
    work.add("tensor_parallel", seconds, seconds)


def attention_work(work: Work, model: ModelConfig, rank: Rank) -> None:
    D, C, N = model.hidden_size, model.head_dim, rank.tokens
    H = rank.share(model.num_attention_heads)
    G = rank.share(model.num_key_value_heads)  # one key-value head is whole on every rank
    if model.mla is None:
        linear(work, rank, N, (H + 2 * G) * C, D)
        linear(work, rank, N, D, H * C)
        rotated = (H + G) * C
    else:
        mla = model.mla
        queried = H * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank:  # what compresses is not split: each rank does its share of the sequence
            linear(work, rank, rank.norm_tokens, mla.q_lora_rank, D)
            linear(work, rank, N, queried, mla.q_lora_rank)
        else:
            linear(work, rank, N, queried, D)
        linear(work, rank, rank.norm_tokens, mla.kv_lora_rank + mla.qk_rope_head_dim, D)
        linear(work, rank, N, H * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        linear(work, rank, N, D, H * mla.v_head_dim)
        rotated = 2 * queried  # keys are put together from two parts
    if model.block == "llama":
        passes(work, rank, 2 * N * rotated, 2 * N * rotated, 1)
    core_attention(work, model, rank)
    norm_and_residual(work, model, rank)
    reduced(work, rank, D)


def core_attention(work: Work, model: ModelConfig, rank: Rank) -> None:
    """Scores, softmax and weighted values.

    Fused (Dao 2023): nothing but queries, keys, values and outputs touch the memory, blocks above the diagonal are
    left out, and the backward does 5 products where the forward does 2, for it computes the scores again. Unfused, as
    in Megatron-LM: the whole square, whose scores (2 bytes, with dropout and its mask) are written by one product, read
    and written by softmax and dropout and read by the other product: 13 bytes forward, 19 backward.
    """
    machine, N, S = rank.machine, rank.tokens, rank.row
    channels = attention_channels(model) / rank.tp
    io = 2 * N * channels * rank.numbers
    peak = machine.sheet.peak(rank.wide_dtype)
    if rank.flash_attention:
        flops = 2 * N * channels * (S + 128) / 2  # a block of 128 x 128 on the diagonal counts whole
        seconds = flops / (peak * machine.reached.attention)
        work.add("attention", bounded(machine, flops, io, seconds).seconds,
                 bounded(machine, 2.5 * flops, 2 * io, 2.5 * seconds).seconds)  # fmt: skip
        return
    scores = N * S * rank.share(model.num_attention_heads)
    flops = 2 * N * channels * S
    seconds = flops / (peak * machine.reached.gemm)
    forward = bounded(machine, flops, io + 4 * scores, seconds).seconds + stream(machine, 9 * scores, 2).seconds
    back = bounded(machine, 2 * flops, 2 * io + 8 * scores, 2 * seconds).seconds
    back += stream(machine, 11 * scores, 2).seconds
    work.add("attention", forward, back)
    if rank.recompute == "selective":
        work.add("recompute", 0, forward)


def mamba_work(work: Work, model: ModelConfig, rank: Rank) -> None:
    """Projections, and a scan of 9 FLOP per state outside the tensor cores (Gu and Dao 2023, appendix D)."""
    mamba, D, N = model.mamba, model.hidden_size, rank.tokens
    I = rank.share(mamba.expand * D)  # noqa: E741
    linear(work, rank, N, 2 * I, D)
    linear(work, rank, N, mamba.dt_rank + 2 * mamba.d_state, I)
    linear(work, rank, N, I, mamba.dt_rank)
    linear(work, rank, N, D, I)
    flops = 9 * N * I * mamba.d_state
    seconds = flops / rank.machine.sheet.peak("float32")
    io = 6 * N * I * rank.numbers  # convolution in and out, step sizes, gate, output
    work.add("elementwise", bounded(rank.machine, flops, io, seconds).seconds,
             bounded(rank.machine, 2 * flops, 2 * io, 2 * seconds).seconds)  # fmt: skip
    norm_and_residual(work, model, rank)
    reduced(work, rank, D)


def cross_attention_work(work: Work, model: ModelConfig, rank: Rank) -> None:
    """What the text costs: queries, outputs and the block's own MLP; the keys and values of images are not counted."""
    D, N, HC = model.hidden_size, rank.tokens, rank.share(model.num_attention_heads) * model.head_dim
    F = rank.share(model.vision.cross_attention_intermediate_size or 4 * D)
    for n, k in ((HC, D), (D, HC), (F, D), (D, F)):
        linear(work, rank, N, n, k)
    for _ in range(2):
        norm_and_residual(work, model, rank)
        reduced(work, rank, D)


def mlp_work(work: Work, model: ModelConfig, rank: Rank, hidden: int, shared: bool = False) -> None:
    """A dense MLP of width `hidden`; one that is `shared` beside routed experts has its norm with them."""
    D, N, F = model.hidden_size, rank.tokens, rank.share(hidden)
    gated = model.block == "llama"
    linear(work, rank, N, 2 * F if gated else F, D)
    linear(work, rank, N, D, F)
    activation(work, rank, N * F, gated)
    if not shared:
        norm_and_residual(work, model, rank)


def activation(work: Work, rank: Rank, size: float, gated: bool) -> None:
    """SwiGLU reads two and writes one, backward reads three and writes two; GELU one less of each."""
    forward, back = (3, 5) if gated else (2, 3)
    passes(work, rank, forward * size, back * size, 1)


def experts_work(work: Work, model: ModelConfig, rank: Rank) -> None:
    """Router, dispatch, grouped products over the real rows of each expert, and the way back.

    The fullest rank sets the pace. The tokens of a sequence that is split, or a slice of each rank's copy, go to the
    expert-parallel rank that holds the expert; tensor-parallel ranks, which share each expert, then gather them. A
    token goes once to each node that has some of its experts, which hands it on (DeepSeek-V3 report, section 3.2.2).
    """
    machine = rank.machine
    D, E, K, N = model.hidden_size, model.num_local_experts, model.num_experts_per_tok, rank.tokens
    F, held = rank.share(model.expert_size), E // rank.ep
    routed = N * K * (rank.imbalance if rank.ep > 1 else 1)  # rows that reach the fullest rank
    tokens = rank.norm_tokens
    back = gemm(machine, tokens, D, E, dtype=rank.wide_dtype).seconds
    back += gemm(machine, E, D, tokens, dtype=rank.wide_dtype).seconds
    work.add("router", gemm(machine, tokens, E, D, dtype=rank.wide_dtype).seconds, back)
    passes(work, rank, 6 * tokens * E, 6 * tokens * E, 4, "router")  # softmax, top-k, auxiliary loss
    moved = (tokens + 3 * routed) * D * rank.numbers  # gathered into the experts' order, weighted and summed after
    work.add("router", stream(machine, moved, 2).seconds, stream(machine, moved, 2).seconds)

    rows = [routed / held] * held
    for n, k in ((2 * F, D), (D, F)):
        back = grouped_gemm(machine, rows, k, n, dtype=rank.dtype).seconds
        back += grouped_gemm(machine, [n] * held, k, routed / held, dtype=rank.dtype).seconds
        work.add("experts", grouped_gemm(machine, rows, n, k, dtype=rank.dtype).seconds, back)
        if rank.dtype == "float8":
            cast = stream(machine, 4 * routed * k).seconds, stream(machine, 4 * routed * n).seconds
            work.add("elementwise", *cast)
    activation(work, rank, routed * F, True)
    norm_and_residual(work, model, rank)
    if model.n_shared_experts:
        mlp_work(work, model, rank, model.n_shared_experts * model.expert_size, shared=True)

    if rank.ep == 1:
        reduced(work, rank, D)
        return
    if model.n_shared_experts:
        reduced(work, rank, D)
    nbytes = routed * D * rank.numbers
    nodes = max(1, rank.ep * rank.tp // machine.sheet.gpus_per_node)
    visited = nodes * (1 - (1 - 1 / nodes) ** K) / K if nodes > 1 else 1  # copies that reach a node, per expert chosen
    there = 2 * all_to_all(machine, visited * nbytes / rank.tp, rank.ep, rank.tp)
    work.add("expert_all_to_all", there, there)
    across = all_gather(machine, nbytes, rank.tp) + reduce_scatter(machine, nbytes, rank.tp)
    work.add("tensor_parallel", across, across)


@lru_cache(maxsize=512)
def embedding_work(model: ModelConfig, rank: Rank) -> Work:
    """The row of each token, and its gradient added to the table."""
    work = Work()
    size = rank.norm_tokens * model.hidden_size
    passes(work, rank, 2 * size, 3 * size, 1, "embedding_and_loss")
    return work


@lru_cache(maxsize=512)
def output_work(model: ModelConfig, rank: Rank) -> Work:
    """Last norm, projection to the vocabulary in at least 16 bit, and cross-entropy over float32 logits.

    The logits are cast (6 bytes), reduced and exponentiated (8) and turned into their gradient (6).
    """
    machine, N, D, V = rank.machine, rank.tokens, model.hidden_size, rank.share(model.vocab_size)
    dtype, work = rank.wide_dtype, Work()
    back = gemm(machine, N, D, V, dtype=dtype).seconds + gemm(machine, V, D, N, dtype=dtype).seconds
    moved = N * V * machine.reached.loss
    forward = gemm(machine, N, V, D, dtype=dtype).seconds + stream(machine, 14 * moved, 4).seconds
    work.add("embedding_and_loss", forward, back + stream(machine, 6 * moved, 2).seconds)
    passes(work, rank, 2 * rank.norm_tokens * D, 3 * rank.norm_tokens * D, 1, "embedding_and_loss")
    return work
