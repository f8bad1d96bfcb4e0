"""When a draft pays: what a verifying step costs against what it gives (Leviathan et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lm.config import ModelConfig, ServingPlan
from moe_lm.scaling.constants import DRAFT_SHARE
from moe_lm.scaling.hardware import Machine
from moe_lm.scaling.routing import expected_distinct
from moe_lm.scaling.serving import decode_step, expected_tokens


@dataclass(frozen=True)
class SpeculationRow:
    """Speculation at one batch."""

    batch: int
    draft_tokens: int
    plain: float
    """Seconds of a step without a draft."""
    verify: float
    """Seconds of a step that verifies the draft, without the draft's own."""
    experts_plain: float
    """Distinct experts of a layer that a plain step reads, of all its ranks; 0 in a dense model."""
    experts_verify: float
    speedup: float
    """Tokens/s against those without a draft, at the plan's acceptance."""
    break_even: float | None
    """Acceptance from which it pays; None where it does not even if every token is accepted."""


def break_even(cost: float, draft_tokens: int) -> float | None:
    """Acceptance at which the expected tokens of a step equal its `cost`, in plain steps; None where none suffices."""
    if cost > draft_tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if expected_tokens(middle, draft_tokens) < cost:
            low = middle
        else:
            high = middle
    return high


def speculation_rows(
    model: ModelConfig, plan: ServingPlan, machine: Machine, *, context: float, draft_tokens: int = 4,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), draft_share: float = DRAFT_SHARE,
) -> list[SpeculationRow]:  # fmt: skip
    """What a draft of `draft_tokens` gives by batch, each of its tokens costing `draft_share` of a plain step.

    While steps are bound by bandwidth, verifying reads the same dense weights again at no cost; of a mixture it reads
    E (1 - (1 - K / E)^T) experts, more than a plain step does.
    """
    rows = []
    for batch in batches:
        plain = decode_step(model, plan, machine, batch=batch, context=context).seconds
        verify = decode_step(model, plan, machine, batch=batch, context=context, new_tokens=draft_tokens + 1).seconds
        cost = verify / plain + draft_tokens * draft_share
        tokens = max(1.0, batch / plan.pp)
        read = [
            expected_distinct(model.num_local_experts, model.num_experts_per_tok, count) if model.is_moe else 0.0
            for count in (tokens, tokens * (draft_tokens + 1))
        ]
        speedup = expected_tokens(plan.acceptance, draft_tokens) / cost
        rows.append(SpeculationRow(batch, draft_tokens, plain, verify, *read, speedup, break_even(cost, draft_tokens)))
    return rows
