"""Activations that a rank keeps from the forward of a layer to its backward, in bytes.

The count of Korthikanti et al. 2022 (section 4) for any block: gpt2 with as many key-value heads as heads and an MLP of
4 D keeps their (34 + 5 H T / D) N D / tp bytes. Only it has dropout. Flash attention keeps, in place of the scores,
one float32 per query and head. Dispatched tokens are not cut by tensor parallelism, because a grouped product keeps its
whole input for the gradient of its weights.

N tokens of a micro-batch, T tokens of a row, D hidden width, H query heads, C channels of a head, F MLP width,
E experts, K experts per token, S shared experts, I inner width of Mamba.
"""

from typing import NamedTuple

from moe_lm.config import ModelConfig, TrainingPlan
from moe_lm.scaling.counts import crosses
from moe_lm.scaling.shards import kv_heads


class Activations(NamedTuple):
    """One layer's, of one micro-batch on one rank, in bytes."""

    kept: float
    """From its forward to its backward."""
    working: float
    """More while its backward runs: what is computed again, gathered, and the gradients of its widest part."""

    @property
    def whole(self) -> float:
        return self.kept + self.working


def activation_width(plan: TrainingPlan) -> int:
    """Bytes of an activation. Products in float8 round their inputs; what is kept stays in bfloat16."""
    return 4 if plan.dtype == "float32" else 2


def layer_activations(
    model: ModelConfig, layer: int, plan: TrainingPlan, tokens: int, row: int, imbalance: float
) -> Activations:
    """Activations of block `layer` for a micro-batch of N = `tokens` in rows of T = `row`.

    With `ep` ranks the fullest one receives `imbalance` times the mean, unless plan.expert_imbalance says otherwise.
    """
    D, width, tp = model.hidden_size, activation_width(plan), plan.tp
    residual_ranks = tp if plan.sequence_parallel else 1
    mask = D if model.block == "gpt2" else 0  # a byte each
    mixer, scores, channels = mixer_activations(model, layer, plan, row)
    hidden, dispatched, routing, hidden_width = mlp_activations(model, layer, plan, imbalance)
    # Both norms' inputs and outputs, and the masks of the two dropouts that write to the residual stream.
    residual = (4 * D * width + 2 * mask + routing) / residual_ranks
    if crosses(model, layer):
        heads = model.num_attention_heads * model.head_dim
        mlp = model.vision.cross_attention_intermediate_size or 4 * D
        residual += 4 * D * width / residual_ranks
        mixer += 2 * (heads + mlp) / tp * width
    whole = tokens * (residual + mixer + scores + hidden + dispatched)
    if plan.recompute == "full":
        kept = tokens * D * width / residual_ranks
    elif plan.recompute == "selective":
        kept = whole - tokens * scores
    else:
        kept = whole
    gathered = D * width if residual_ranks > 1 else 0
    gradients = 2 * D * width / residual_ranks + max(channels / tp * width, hidden_width / tp * width + dispatched)
    return Activations(kept, whole - kept + tokens * (gathered + gradients))


def mixer_activations(model: ModelConfig, layer: int, plan: TrainingPlan, row: int) -> tuple[float, float, float]:
    """Of what mixes tokens: bytes per token, bytes per token of its scores, and channels of its widest part."""
    D, H, C, tp, width = model.hidden_size, model.num_attention_heads, model.head_dim, plan.tp, activation_width(plan)
    if not model.attends(layer):  # both halves of the input, after the convolution, step sizes, scanned, gated
        inner, small = model.mamba.expand * D, model.mamba.dt_rank + 2 * model.mamba.d_state
        return (6 * inner / tp + small) * width, 0.0, 2 * inner
    if model.mla is not None:
        mla = model.mla
        queried = H * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        compressed = mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim
        mixed = ((2 * queried + 2 * H * mla.v_head_dim) / tp + compressed) * width
        channels = 2 * queried + H * mla.v_head_dim
    else:
        mixed = (2 * H / tp + 2 * kv_heads(model, tp)) * C * width
        channels = (H + 2 * kv_heads(model, tp) * tp) * C
    if plan.flash_attention:
        return mixed + 4 * H / tp, 0.0, channels
    dropped = width + 1 if model.block == "gpt2" else 0  # probabilities after dropout, and its mask
    return mixed, H / tp * row * (width + dropped), channels


def mlp_activations(
    model: ModelConfig, layer: int, plan: TrainingPlan, imbalance: float
) -> tuple[float, float, float, float]:
    """Of the MLP, per token: bytes of hidden channels, dispatched tokens, routing; and channels of its widest part."""
    D, tp, width = model.hidden_size, plan.tp, activation_width(plan)
    if not model.routes(layer):
        F, gated = model.intermediate_size, model.block != "gpt2"
        return (3 if gated else 2) * F / tp * width, 0.0, 0.0, (2 if gated else 1) * F
    received = 1.0 if plan.ep == 1 else plan.expert_imbalance or imbalance
    K, S, F = model.num_experts_per_tok * received, model.n_shared_experts, model.expert_size
    routing = 4 * model.num_local_experts + 12 * model.num_experts_per_tok  # float32 logits; weight, place of a slot
    return 3 * (K + S) * F / tp * width, K * D * width, routing, 2 * K * F
