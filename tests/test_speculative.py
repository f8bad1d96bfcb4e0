"""Speculative sampling against exact laws: of every kind of guess, with penalties, masks and filters."""

import itertools
from collections import Counter

import pytest
import torch
from engines import sample
from scipy.stats import chisquare

from moe_lm.engine import speculative
from moe_lm.engine.request import SamplingParams
from moe_lm.engine.sampler import Row, TokenCounts, distributions, draw
from moe_lm.engine.speculative import IN_DRAFT, Draft, accept, verify
from moe_lm.engine.uniforms import DRAFT

pytestmark = pytest.mark.usefixtures("one_thread")

V, LENGTH, PROMPT = 4, 3, [1, 3]
PARAMS = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.8, "presence_penalty": 0.6, "frequency_penalty": -0.5, "temperature": 1.3},
    "filters": {"top_k": 3, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5, "logit_bias": {2: 0.7}},
}
TABLES = torch.randn(2, V, V, V, generator=torch.Generator().manual_seed(5)) * 1.2
TARGET, OTHER = TABLES
"""Logits after the last two tokens, of the target and of the draft model, float32 (V, V, V)."""


def allowed_after(output: list[int], masked: bool) -> torch.Tensor | None:
    """A grammar of sorts: no token twice in a row."""
    return torch.tensor([not output or token != output[-1] for token in range(V)]) if masked else None


def row(params: SamplingParams, output: list[int], drafted: list[int], masked: bool, coupled: bool = False) -> Row:
    counts = TokenCounts(V, PROMPT)
    counts.add(output)
    position, allowed = len(PROMPT) + len(output) + len(drafted), allowed_after(output + drafted, masked)
    return Row(params, position, counts=counts, drafted=drafted, allowed=allowed, coupled=coupled)


def logits_after(table: torch.Tensor, output: list[int]) -> torch.Tensor:
    return table[tuple((PROMPT + output)[-2:])]


def exact_law(settings: dict, masked: bool) -> dict[tuple[int, ...], float]:
    """Probability of every output of LENGTH tokens, with penalties, filters and mask as of the tokens before each."""
    law, params = {(): 1.0}, SamplingParams(**settings)
    for _ in range(LENGTH):
        outputs = [list(output) for output in law]
        logits = torch.stack([logits_after(TARGET, output) for output in outputs])
        p = distributions(logits, [row(params, output, [], masked) for output in outputs]).tolist()
        law = {
            (*output, token): law[tuple(output)] * p[i][token] for i, output in enumerate(outputs) for token in range(V)
        }
    return law


def p_value(law: dict[tuple[int, ...], float], counts: Counter) -> float:
    total = counts.total()
    assert all(law[key] > 0 for key in counts), "what cannot be was drawn"
    likely = [key for key, p in law.items() if p * total >= 5]
    observed, expected = [counts[key] for key in likely], [law[key] * total for key in likely]
    observed.append(total - sum(observed))
    expected.append(total - sum(expected))
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return chisquare(observed, expected, sum_check=False).pvalue


def guess(
    kind: str, params: list[SamplingParams], outputs: list[list[int]], masked: bool, coupled: bool
) -> list[Draft]:
    """Drafts of two tokens: fixed ones, ones of a draft model, or a fixed one that the draft model verifies."""
    drafts = [Draft([], None, []) for _ in outputs]
    if kind == "none":
        return drafts
    for draft, output in zip(drafts, outputs, strict=True):
        draft.tokens = [(len(output) + sum(output) + i) % V for i in range(2)]
    if kind == "ngram":
        return drafts
    helps = [draft.tokens[:1] if kind == "staged" else [] for draft in drafts]
    for draft in drafts:
        draft.tokens = []
    for _ in range(2):
        rows, logits = [], []
        for own, output, draft, help in zip(params, outputs, drafts, helps, strict=True):
            for i in range(len(help) + 1):
                rows.append(row(own, output, draft.tokens + help[:i], masked, coupled))
                logits.append(logits_after(OTHER, output + draft.tokens + help[:i]))
        laws = distributions(torch.stack(logits), rows)
        if kind == "staged" or coupled:
            found = verify(torch.stack(logits), [Draft(help) for help in helps], rows, IN_DRAFT, laws)
        else:
            found = [(0, draw(law, row.uniform(DRAFT))) for law, row in zip(laws, rows, strict=True)]
        start = 0
        for index, (count, token) in enumerate(found):
            draft, help = drafts[index], helps[index]
            new = laws[start : start + count + 1]
            draft.tokens = [*draft.tokens, *help[:count], token]
            if not coupled:
                draft.q = new if draft.q is None else torch.cat([draft.q, new])
            start += len(help) + 1
        helps = [[] for _ in helps]
    return drafts


def generated(kind: str, settings: dict, masked: bool, number: int, size: int = 1000, coupled: bool = False) -> Counter:
    """Outputs of LENGTH tokens, verified step by step, `size` sequences of seeds of their own at a time."""
    counts = Counter()
    for first in range(0, number, size):
        params = [SamplingParams(**settings, seed=first + i) for i in range(size)]
        outputs: list[list[int]] = [[] for _ in params]
        while open_ := [i for i, output in enumerate(outputs) if len(output) < LENGTH]:
            drafts = guess(kind, [params[i] for i in open_], [outputs[i] for i in open_], masked, coupled)
            rows, logits = [], []
            for i, draft in zip(open_, drafts, strict=True):
                for k in range(len(draft.tokens) + 1):
                    rows.append(row(params[i], outputs[i], draft.tokens[:k], masked, coupled))
                    logits.append(logits_after(TARGET, outputs[i] + draft.tokens[:k]))
            for i, draft, (count, token) in zip(open_, drafts, verify(torch.stack(logits), drafts, rows), strict=True):
                outputs[i] += [*draft.tokens[:count], token]
        counts.update(tuple(output[:LENGTH]) for output in outputs)
    return counts


@pytest.mark.parametrize("kind", ["none", "ngram", "draft", "staged"])
@pytest.mark.parametrize("name", PARAMS)
def test_speculation_has_the_targets_law(kind, name):
    masked = name == "penalties"
    assert p_value(exact_law(PARAMS[name], masked), generated(kind, PARAMS[name], masked, 1500)) > 1e-4


@pytest.mark.parametrize("name", PARAMS)
def test_decided_tokens_have_the_targets_law_and_are_the_same_with_every_kind_of_guess(name):
    masked = name == "penalties"
    plain = generated("none", PARAMS[name], masked, 1500, coupled=True)
    assert p_value(exact_law(PARAMS[name], masked), plain) > 1e-4
    for kind in ("ngram", "draft", "staged"):
        assert generated(kind, PARAMS[name], masked, 300, coupled=True) == generated(
            "none", PARAMS[name], masked, 300, coupled=True
        )


def broken(fault: str):
    """`accepted` with one fault."""

    def rule(draft, target, tokens, tests):
        q_rows = torch.nn.functional.one_hot(torch.tensor(tokens), V).float() if draft is None else draft
        for i, token in enumerate(tokens):
            p, q = target[i, token].item(), q_rows[i, token].item()
            falls = {"accepts all": p == 0, "compares the wrong way": tests[i] * p >= q}.get(fault, tests[i] * q >= p)
            if falls:
                residual = (target[i] - q_rows[i]).clamp(min=0)
                if fault == "replaces from the target" or not residual.any():
                    residual = target[i]
                return i, residual
        return len(tokens), target[len(tokens) - (fault == "draws the last from the row before")]

    return rule


FAULTS = ["accepts all", "replaces from the target", "compares the wrong way", "draws the last from the row before"]
IN_NGRAM = [FAULTS[0], FAULTS[1], FAULTS[3]]
"""Where q = 1, comparing the wrong way round never takes a token, which is slow but not wrong."""


@pytest.mark.parametrize(
    ("kind", "fault"), [*(("draft", fault) for fault in FAULTS), *(("ngram", fault) for fault in IN_NGRAM)]
)
def test_faults_show(monkeypatch, kind, fault):
    monkeypatch.setattr(speculative, "accepted", broken(fault))
    try:
        value = p_value(exact_law({}, False), generated(kind, {}, False, 1200))
    except AssertionError:
        value = 0.0
    assert value < 1e-6


def test_the_rule_without_a_fault_does_not(monkeypatch):
    monkeypatch.setattr(speculative, "accepted", broken("none"))
    assert p_value(exact_law({}, False), generated("draft", {}, False, 1200)) > 1e-4


def test_penalties_that_ignore_the_draft_show(monkeypatch):
    law, overlaid = exact_law(PARAMS["penalties"], False), TokenCounts.overlaid
    monkeypatch.setattr(TokenCounts, "overlaid", lambda self, _: overlaid(self, []))
    value = p_value(law, generated("ngram", PARAMS["penalties"], False, 1200))
    assert value < 1e-6


def test_random_numbers_used_twice_show(monkeypatch):
    own = Row.uniform
    monkeypatch.setattr(Row, "uniform", lambda self, _: own(self, DRAFT))
    assert p_value(exact_law({}, False), generated("draft", {}, False, 1200)) < 1e-6


def test_accept_on_certainties():
    one_hot = torch.eye(3)
    assert accept(one_hot[:2], one_hot, [0, 1], [0.999, 0.999], [0.5] * 3) == (2, 2)
    assert accept(one_hot[:2], one_hot, [1, 1], [0.0, 0.0], [0.5] * 3) == (0, 0)
    assert accept(None, one_hot, [0, 2], [0.999, 0.0], [0.5] * 3) == (1, 1)
    same = torch.tensor([[0.5, 0.5]])
    assert accept(same, torch.cat([same, same]), [1], [0.999], [0.9, 0.2]) == (1, 0)
    assert accept(None, torch.cat([same, same]), [1], [0.5], [0.2, 0.9]) == (0, 0)
    assert accept(None, same, [], [], [0.7]) == (0, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_greedy_drafts_stand_as_far_as_they_are_the_plain_output(masked):
    params = SamplingParams(temperature=0, repetition_penalty=1.3)
    plain: list[int] = []
    for _ in range(4):
        plain += sample(logits_after(TARGET, plain)[None], [row(params, plain, [], masked)])
    for tokens in itertools.product(range(V), repeat=3):
        count = next((i for i in range(3) if tokens[i] != plain[i]), 3)
        rows = [row(params, [], list(tokens[:k]), masked) for k in range(4)]
        logits = torch.stack([logits_after(TARGET, list(tokens[:k])) for k in range(4)])
        assert verify(logits, [Draft(list(tokens))], rows) == [(count, plain[count])]


def test_ragged_drafts_of_all_kinds_in_one_batch_give_what_each_gives_alone():
    batch = []
    for seed in range(40):
        params = SamplingParams(temperature=seed % 3 / 2, seed=seed, top_k=seed % 4, presence_penalty=seed % 2)
        tokens = [(seed + i) % V for i in range(seed % 5)]
        q = torch.rand(len(tokens), V).softmax(1) if seed % 2 and tokens else None
        rows = [row(params, [], tokens[:k], seed % 7 == 0) for k in range(len(tokens) + 1)]
        batch.append((torch.randn(len(rows), V), Draft(tokens, q), rows))
    logits, drafts = torch.cat([each[0] for each in batch]), [each[1] for each in batch]
    rows = [row for each in batch for row in each[2]]
    whole = verify(logits, drafts, rows)
    assert whole == verify(logits, drafts, rows, laws=distributions(logits, rows))
    assert whole == [verify(own, [draft], own_rows)[0] for own, draft, own_rows in batch]
    assert {count for count, _ in whole} >= {0, 1, 2}
