"""A cluster to plan for, and how a model is laid over it. Nothing here changes a run: moe_lm.scaling reads it.

Ranks: `tp` x `pp` x `dp` GPUs. Tensor parallelism splits every matrix over `tp`, pipeline stages split the layers over
`pp`, the rest are replicas; `ep` of the replicas share the experts, each holding 1 / ep of them.
"""

from dataclasses import dataclass
from typing import Literal

from moe_lm.config.errors import require, require_positive

Dtype = Literal["float32", "bfloat16", "float16", "float8"]


@dataclass(frozen=True)
class TrainingPlan:
    """How training is laid over GPUs. Sizes of the batch and of the run are those of [train] and [data]."""

    gpu: str = "h100"
    """A sheet of configs/hardware, or the path of one."""
    gpus: int | None = None
    """All of them; tp * pp if not given."""
    tp: int = 1
    """Ranks that split every matrix."""
    pp: int = 1
    """Stages of the pipeline."""
    ep: int = 1
    """Replicas that share the experts: a divisor of the replicas, and of the experts."""
    interleave: int = 1
    """Chunks of layers that each stage holds (interleaved 1F1B, Narayanan et al. 2021, section 2.2)."""
    zero: Literal[0, 1, 2, 3] = 1
    """What replicas shard: 1 optimizer states, 2 also gradients, 3 also weights, as FSDP (Rajbhandari et al. 2020)."""
    zero_group: int | None = None
    """Replicas that shard among themselves and copy to the other groups (hybrid sharding); all if not given."""
    micro_batch: int = 1
    """Rows of data.sequence_length in one forward of a stage."""
    recompute: Literal["none", "selective", "full"] = "selective"
    """Activations computed again in the backward: of attention's core (Korthikanti et al. 2022), or of whole layers."""
    sequence_parallel: bool = True
    """Split norms and residuals over the tensor-parallel ranks, too (Korthikanti et al. 2022, section 4.2.2)."""
    flash_attention: bool = True
    """Attention without its score matrix in memory (Dao et al. 2022)."""
    dtype: Dtype = "bfloat16"
    """Dtype of the matrix products. Weights have two bytes beside float32 master weights; float32 has these alone."""
    expert_imbalance: float | None = None
    """Tokens of the fullest expert-parallel rank as a multiple of the mean; by default the planner's constant."""
    price: float | None = None
    """Dollars per GPU and hour; that of the sheet if not given."""

    def __post_init__(self):
        require_positive(self, "tp", "pp", "ep", "interleave", "micro_batch", section="plan.")
        for name in ("gpus", "zero_group", "price"):
            value = getattr(self, name)
            require(value is None or value > 0, f"plan.{name} = {value} must be greater than 0.")
        imbalance = self.expert_imbalance
        require(imbalance is None or imbalance >= 1, f"plan.expert_imbalance = {imbalance} must be at least 1.")


@dataclass(frozen=True)
class ServingPlan:
    """How serving is laid over GPUs, and what is asked of it."""

    gpu: str = "h100"
    """A sheet of configs/hardware, or the path of one."""
    tp: int = 1
    """Ranks that split every matrix."""
    pp: int = 1
    """Stages of the pipeline, each with its own requests in flight."""
    ep: int = 1
    """Ranks that share the experts, each with its own requests: ep copies of what is not experts."""
    batch: int = 16
    """Requests that decode together, over all ranks."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    output_tokens: int = 512
    """Tokens of an answer."""
    weight_bits: Literal[4, 8, 16, 32] = 16
    """Bits of a weight."""
    kv_bits: Literal[8, 16, 32] = 16
    """Bits of a number in the KV cache."""
    dtype: Dtype = "bfloat16"
    """Dtype of the matrix products: weights of fewer bits are widened to it."""
    draft_tokens: int = 0
    """Tokens that a draft proposes per step; 0 is no speculation."""
    acceptance: float = 0.7
    """Chance that a proposed token is accepted, given that those before it were."""
    price: float | None = None
    """Dollars per GPU and hour; that of the sheet if not given."""

    def __post_init__(self):
        names = ("tp", "pp", "ep", "batch", "prompt_tokens", "output_tokens")
        require_positive(self, *names, section="serving.")
        require(self.draft_tokens >= 0, f"serving.draft_tokens = {self.draft_tokens} must be 0 (none) or more.")
        require(0 <= self.acceptance <= 1, f"serving.acceptance = {self.acceptance} must be between 0 and 1.")
        require(self.price is None or self.price > 0, f"serving.price = {self.price} must be greater than 0.")
