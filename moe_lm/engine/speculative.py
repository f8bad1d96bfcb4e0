"""Speculative sampling: which guessed tokens stand, so that the target's distribution is untouched.

Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2. k guessed tokens of one sequence, n rows of all
sequences, V vocabulary.
"""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from moe_lm.engine.sampler import Row, decided, distributions, draw, take
from moe_lm.engine.uniforms import ACCEPT, DRAFT, DRAFT_ACCEPT, DRAFT_RESIDUAL, RESIDUAL, SAMPLE


@dataclass
class Draft:
    """Tokens guessed for one sequence; none for one that only decodes."""

    tokens: list[int] = field(default_factory=list)
    q: Tensor | None = None
    """What each token was drawn from, float32 (k, V); None where they were not drawn, as in prompt lookup, which is
    q = 1 at the token."""
    sources: list[str] = field(default_factory=list)
    """Who guessed each token, `draft` or `ngram`, for the report. A token on which the draft model and prompt lookup
    agreed was still drawn from the draft model's distribution."""


@dataclass(frozen=True)
class Numbers:
    """Which random numbers a verification uses; see moe_lm.engine.uniforms."""

    accept: int
    """Whether a token stands."""
    residual: int
    """What replaces one that does not."""
    sample: int
    """What follows when all stand."""


IN_TARGET = Numbers(ACCEPT, RESIDUAL, SAMPLE)
"""The target verifies: its plain decoding is the case of no guesses."""
IN_DRAFT = Numbers(DRAFT_ACCEPT, DRAFT_RESIDUAL, DRAFT)
"""The draft model verifies what prompt lookup guessed for it."""


def verify(
    logits: Tensor, drafts: list[Draft], rows: list[Row], numbers: Numbers = IN_TARGET, laws: Tensor | None = None
) -> list[tuple[int, int]]:
    """How many guessed tokens of each sequence stand, and the token that follows them.

    logits (n, V) float32 and rows (n): for each draft in turn its k + 1 rows, after the last certain token and after
    each guessed one; row i of a draft has `drafted` = the first i tokens of it. Rows after a token that its mask
    forbids are not looked at. laws (n, V): the rows' `distributions`, where they are known already.
    """
    assert logits.shape[0] == len(rows) == sum(len(draft.tokens) + 1 for draft in drafts)
    result: list[tuple[int, int]] = [(0, 0)] * len(drafts)
    spans, start = [], 0
    for draft in drafts:
        spans.append(range(start, start + len(draft.tokens) + 1))
        start += len(draft.tokens) + 1
    fixed = [index for index, span in enumerate(spans) if rows[span[0]].is_decided]
    if fixed:
        best = iter(decided(*taken(logits, rows, [i for index in fixed for i in spans[index]])))
        for index in fixed:
            result[index] = common_prefix(drafts[index].tokens, list(islice(best, len(spans[index]))))
    sampled = [index for index, span in enumerate(spans) if not rows[span[0]].is_decided]
    if sampled:
        chosen = [i for index in sampled for i in spans[index]]
        p, end = distributions(*taken(logits, rows, chosen)) if laws is None else take(laws, chosen), 0
        for index in sampled:
            draft, own = drafts[index], [rows[i] for i in spans[index]]
            start, end = end, end + len(own)
            tests = [row.uniform(numbers.accept) for row in own[:-1]]
            count, law = accepted(draft.q, p[start:end], draft.tokens, tests)
            purpose = numbers.sample if count == len(draft.tokens) else numbers.residual
            result[index] = count, draw(law, own[count].uniform(purpose))
    return result


def taken(logits: Tensor, rows: list[Row], chosen: list[int]) -> tuple[Tensor, list[Row]]:
    return take(logits, chosen), [rows[i] for i in chosen]


def common_prefix(tokens: list[int], best: list[int]) -> tuple[int, int]:
    """`accept` where the target's tokens are decided: best (k + 1) are what they will be."""
    count = next((i for i, token in enumerate(tokens) if token != best[i]), len(tokens))
    return count, best[count]


def accept(
    draft: Tensor | None, target: Tensor, tokens: list[int], tests: list[float], draws: list[float]
) -> tuple[int, int]:
    """How many of the guessed tokens stand, and the token that follows them.

    draft (k, V): what each guessed token was drawn from, None for certainty; target (k + 1, V): what the target would
    draw there and after the last; tokens: the k guessed ones; tests (k) and draws (k + 1): numbers in [0, 1), the
    latter for the token that follows, by its place.

    Token i stands with probability min(1, target_i / draft_i). The first that does not is replaced by a draw from
    max(0, target - draft), else one token is drawn after the last. Each token so drawn has the target's distribution,
    whatever the draft was.
    """
    count, law = accepted(draft, target, tokens, tests)
    return count, draw(law, draws[count])


def accepted(draft: Tensor | None, target: Tensor, tokens: list[int], tests: list[float]) -> tuple[int, Tensor]:
    """How many of the guessed tokens stand, and what the next one is drawn from, (V,), not normalised."""
    k = len(tokens)
    if not k:
        return 0, target[0]
    # In numpy: on rows of 4,096 a small operation of torch's costs several times as much.
    places = list(range(k)), tokens
    p = target.numpy()[places].tolist()
    q = draft.numpy()[places].tolist() if draft is not None else [1.0] * k
    # Written so that a forbidden token, p = 0, falls, and so does what follows it, where p may be NaN.
    count = next((i for i in range(k) if not tests[i] * q[i] < p[i]), k)
    if count == k:
        return k, target[k]
    if draft is None:
        residual = target[count].numpy().copy()
        residual[tokens[count]] = 0
    else:
        residual = np.maximum(target[count].numpy() - draft[count].numpy(), 0)
    # Where target and draft agree to the last bit but for rounding, there is no residual to draw from.
    return count, torch.from_numpy(residual) if residual.any() else target[count]
