"""What choices of the model and of its storage change in decode, and what bandwidth alone allows.

H query heads, G key-value heads.
"""

from dataclasses import dataclass, replace

from moe_lm.config import ConfigError, ModelConfig, ServingPlan, require
from moe_lm.scaling.counts import cache_numbers
from moe_lm.scaling.hardware import Hardware, Machine
from moe_lm.scaling.serving import decode_step


@dataclass(frozen=True)
class ChoiceRow:
    """A decode step with one choice."""

    name: str
    cache_per_token: float
    """Bytes of cache of a token of context, one copy."""
    weight_bytes: float
    """Bytes of weights that one GPU reads in the step."""
    cache_bytes: float
    """Bytes of cache that one GPU reads in the step, with its copies of heads."""
    seconds: float
    tokens_per_s: float


def choice(name: str, model: ModelConfig, plan: ServingPlan, machine: Machine, context: float) -> ChoiceRow:
    step = decode_step(model, plan, machine, batch=plan.batch, context=context)
    held = cache_numbers(model) * plan.kv_bits / 8
    return ChoiceRow(name, held, step.weight_bytes, step.cache_bytes, step.seconds, step.tokens_per_s)


def head_rows(model: ModelConfig, plan: ServingPlan, machine: Machine, *, context: float) -> list[ChoiceRow]:
    """One key-value head (MQA), the model's own number where it is another, and one for each query head (MHA).

    Under tensor parallelism one head is whole on every rank: a rank then reads 1 / G of what MHA's G heads take, not
    1 / H. Raises ConfigError for latent attention, which has no such heads.
    """
    require(model.mla is None, "model.mla has no key-value heads to choose the number of.")
    H = model.num_attention_heads
    numbers = sorted({1, model.num_key_value_heads, H})
    names = {1: "MQA", H: "MHA"}
    return [
        choice(names.get(G, f"GQA {G}"), replace(model, num_key_value_heads=G), plan, machine, context)
        for G in numbers
    ]  # fmt: skip


def bits_rows(model: ModelConfig, plan: ServingPlan, machine: Machine, *, context: float) -> list[ChoiceRow]:
    """Weights and cache of 16 bits, either or both of 8, and weights of 4: products stay in the plan's dtype."""
    pairs = ((16, 16), (8, 16), (16, 8), (8, 8), (4, 16), (4, 8))
    return [
        choice(f"weights {w} bit, cache {kv} bit", model, replace(plan, weight_bits=w, kv_bits=kv), machine, context)
        for w, kv in pairs
    ]


def flops_per_weight_byte(batch: float, weight_bits: int) -> float:
    """FLOP that a byte of a dense weight carries in a step: 2 for each token of the batch and weight."""
    return 2 * batch * 8 / weight_bits


def ridge(sheet: Hardware, dtype: str) -> float:
    """FLOP per byte from which arithmetic bounds, not bandwidth."""
    return sheet.peak(dtype) / sheet.bandwidth


def readable_parameters(bandwidth: float, tokens_per_s: float, weight_bits: float, share: float = 1.0) -> float:
    """Dense parameters that a reading share of `bandwidth` (bytes/s, of all devices) passes `tokens_per_s` times.

    One sequence reads every weight once a token, so that this bounds the model that answers so fast. Raises
    ConfigError for a share that is none.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share = {share} of the bandwidth must be above 0 and at most 1.")
    return bandwidth * share * 8 / (weight_bits * tokens_per_s)
