"""Loads of experts: closed forms against each other, against draws, and against trained routers."""

import itertools
import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.config import ConfigError
from moe_lm.scaling.routing import (
    RouterLoads,
    draw,
    expected_distinct,
    expected_distinct_by,
    expected_most,
    fullest_share,
    inclusion,
    load_counts,
    mean_tokens,
    routing_rows,
    simulate,
    token_distribution,
)

TRAINED = Path(__file__).resolve().parents[1] / "kernels" / "bench" / "trained_router.json"


def test_reported_loads():
    assert mean_tokens(16, 2, 8) == 1  # a batch of 8, top-2 of 16
    assert mean_tokens(16, 2, 4096) == 512
    chances = token_distribution(16, 2, 8)
    assert chances[0] == pytest.approx((7 / 8) ** 8)
    assert chances[8] == pytest.approx((1 / 8) ** 8)
    assert chances[4] == pytest.approx(70 * (1 / 8) ** 4 * (7 / 8) ** 4)
    assert expected_distinct(16, 2, 8) == pytest.approx(16 * (1 - (7 / 8) ** 8))


@given(st.integers(1, 32), st.integers(1, 8), st.integers(0, 500))
def test_distribution_is_one_and_has_the_mean(experts, top_k, tokens):
    top_k = min(top_k, experts)
    chances = token_distribution(experts, top_k, tokens)
    assert len(chances) == tokens + 1
    assert math.fsum(chances) == pytest.approx(1, abs=1e-9)
    assert math.fsum(n * c for n, c in enumerate(chances)) == pytest.approx(
        mean_tokens(experts, top_k, tokens), rel=1e-9
    )
    assert expected_distinct(experts, top_k, tokens) == pytest.approx(experts * (1 - chances[0]), abs=1e-9)


def test_inclusion_by_hand():
    shares = [0.5, 0.3, 0.2]
    assert inclusion(shares, 1) == pytest.approx(shares)
    second = [p * (1 + sum(q / (1 - q) for j, q in enumerate(shares) if j != i)) for i, p in enumerate(shares)]
    assert inclusion(shares, 2) == pytest.approx(second, abs=1e-9)
    assert inclusion(shares, 3) == [1, 1, 1]
    assert inclusion([2.0, 0.0, 2.0, 4.0], 3) == [1, 0, 1, 1]
    with pytest.raises(ConfigError, match="1 experts have a share, fewer than num_experts_per_tok = 2"):
        inclusion([1.0, 0.0], 2)


def test_inclusion_of_three_is_the_sum_over_orders():
    shares = [0.4, 0.05, 0.3, 0.15, 0.1]
    expected = [0.0] * 5
    for order in itertools.permutations(range(5), 3):
        chance, left = 1.0, 1.0
        for expert in order:
            chance *= shares[expert] / left
            left -= shares[expert]
        for expert in order:
            expected[expert] += chance
    assert inclusion(shares, 3) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=12), st.integers(1, 12))
def test_inclusion_is_k_chances(shares, top_k):
    top_k = min(top_k, len(shares))
    chances = inclusion(shares, top_k)
    assert math.fsum(chances) == pytest.approx(top_k, abs=1e-8)
    by_share = [chance for _, chance in sorted(zip(shares, chances, strict=True))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(by_share))
    equal = inclusion([3.0] * len(shares), top_k)
    assert equal == pytest.approx([top_k / len(shares)] * len(shares), abs=1e-9)


def test_draws_are_distinct_and_seeded():
    counts = draw([1.0] * 4, 3, 50, random.Random(1))
    assert sum(counts) == 150
    assert max(counts) <= 50  # nobody is drawn twice for a token
    assert draw([1.0, 0.0, 1.0], 2, 10, random.Random(1)) == [10, 0, 10]
    assert simulate([1.0] * 4, 2, 5, trials=3, seed=7) == simulate([1.0] * 4, 2, 5, trials=3, seed=7)
    assert simulate([1.0] * 4, 2, 5, trials=3, seed=7) != simulate([1.0] * 4, 2, 5, trials=3, seed=8)


@pytest.mark.parametrize("shares", [[1.0] * 16, [1 / (n + 1) for n in range(16)]])
def test_simulation_agrees(shares):
    batches = simulate(shares, 2, 24, trials=1500, seed=3)
    assert fmean(sum(c > 0 for c in b) for b in batches) == pytest.approx(expected_distinct_by(shares, 2, 24), rel=0.01)
    drawn = [fmean(b[e] for b in batches) / 24 for e in range(16)]
    assert drawn == pytest.approx(inclusion(shares, 2), abs=0.01)
    assert fmean(map(max, batches)) == pytest.approx(expected_most(inclusion(shares, 2), 24), rel=0.03)


def test_distribution_agrees_with_draws():
    batches = simulate([1.0] * 16, 2, 8, trials=1500, seed=5)
    seen = [sum(c == n for b in batches for c in b) / (16 * 1500) for n in range(9)]
    assert seen == pytest.approx(token_distribution(16, 2, 8), abs=0.01)


@pytest.mark.parametrize(("experts", "top_k", "tokens", "ranks"), [(16, 2, 64, 4), (64, 6, 100, 8), (8, 2, 30, 8)])
def test_fullest_rank_agrees_with_draws(experts, top_k, tokens, ranks):
    held = experts // ranks
    loads = []
    for batch in simulate([1.0] * experts, top_k, tokens, trials=200, seed=2):
        loads.append(max(sum(batch[r * held : (r + 1) * held]) for r in range(ranks)))
    mean = tokens * top_k / ranks
    assert fullest_share(experts, top_k, tokens, ranks) == pytest.approx(fmean(loads) / mean, rel=0.06)


def test_fullest_share_has_limits():
    assert fullest_share(16, 2, 100, 1) == 1
    assert fullest_share(4, 4, 10, 2) == 1
    assert fullest_share(256, 8, 1e9, 8) == pytest.approx(1, abs=1e-3)
    assert fullest_share(8, 2, 1, 8) == 4  # the one token gives one of 8 ranks 1 where the mean is 1/4


def test_a_trained_router_is_less_even_than_its_shares():
    real = load_counts(TRAINED)
    assert (real.tokens, real.top_k, len(real.shares)) == (128, 2, 16)
    assert sum(real.shares) == pytest.approx(1)
    distinct, mean, fullest = routing_rows(real.shares, real.top_k, 128, real=real, trials=50)
    assert distinct.real < distinct.expected < distinct.uniform <= 16
    assert mean.real == mean.simulated == mean.uniform == 16
    assert fullest.uniform < fullest.expected < fullest.real  # one text likes some experts: 23, 31 and 48 tokens
    assert fullest.real / 16 == pytest.approx(3.0, abs=0.05)  # as the file's own note says
    assert fullest.simulated == pytest.approx(fullest.expected, rel=0.03)
    assert all(row.real is None for row in routing_rows(real.shares, 2, 8, real=real, trials=5))


def test_counts_of_a_run(tmp_path):
    (tmp_path / "config.toml").write_text("[model]\nnum_local_experts = 4\nnum_experts_per_tok = 2\n")
    lines = [{"tokens": 64, "expert_load": [[1, 0, 0, 0]]}, {"tokens": 164, "expert_load": [[0.5, 0.25, 0.125, 0.125]]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_counts(tmp_path) == RouterLoads(((100, 50, 25, 25),), 100, 2)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no step yet"):
        load_counts(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no counts of a router"),
        ("[", "holds no counts of a router"),
        ('{"windows": [], "window_tokens": 1, "top_k": 1}', "has no windows"),
        ('{"windows": [[3, 2]], "window_tokens": 2, "top_k": 2}', r"a window of 2 tokens has 4 slots, not \[5\]"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_counts(path)
    with pytest.raises(ConfigError, match="holds no counts of a router"):
        load_counts(tmp_path / "none.json")
