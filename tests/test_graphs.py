"""Steps replayed as CUDA graphs. What a graph holds and is given is shown on a CPU, with a capture that computes the
held step again at every replay; that a GPU's graphs do the same, and what its engine promises, by the tests marked gpu.
"""

import pytest
import torch
from engines import make_model, near_copy, same, solo
from hypothesis import given
from hypothesis import strategies as st

import kernels
from moe_lm.engine import Engine, SamplingParams, runner
from moe_lm.engine.batch import Piece
from moe_lm.engine.graphs import MOST_TOKENS, Graphs, common_size
from moe_lm.engine.runner import Runner

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 19, [5, 4, 3, 2, 1], list(range(90, 20, -1))]


class Recomputed:
    """Stands in for CUDA's capture."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, call):
        self.captures += 1
        result = tuple(torch.zeros_like(part) for part in call())

        def replay():
            self.replays += 1
            for target, part in zip(result, call(), strict=True):
                target.copy_(part)

        return replay, result


def with_graphs(engine: Engine, monkeypatch, capture) -> None:
    """Have the engine's runners step as they do on a GPU."""
    monkeypatch.setattr(runner, "to_host", lambda step: step)
    for each in engine.runners:
        each.graphs = Graphs(each.states, capture)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 5000))
def test_common_sizes_hold_the_step_and_little_more(tokens, sequences, pages):
    sequences = min(tokens, sequences)
    size = common_size(tokens, sequences, pages)
    if tokens > MOST_TOKENS:
        assert size is None
        return
    assert tokens <= size.tokens <= tokens * 9 / 8
    assert size.sequences >= sequences + size.tokens - tokens
    assert pages <= size.pages < max(17, 2 * pages)


def test_there_are_few_common_sizes():
    sizes = {common_size(n, min(n, 32), pages) for n in range(1, MOST_TOKENS + 1) for pages in range(1, 513)}
    assert len(sizes) == 6 * 56


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_local_experts": 0}, {"router_bias_update_rate": 0.001, "norm_topk_prob": False}],
    ids=["mixture", "dense", "biased"],
)
@pytest.mark.parametrize("speculation", ["none", "draft", "ngram"])
def test_an_engine_gives_the_same_through_graphs(speculation, changes, monkeypatch):
    model = make_model(3, **changes)
    for bias in model.router_biases:
        bias.copy_(torch.randn(bias.shape) / 4)
    params = [SamplingParams(12, temperature=i % 2, seed=i, logprobs=2) for i in range(len(PROMPTS))]
    engine = Engine(
        model,
        draft=near_copy(model),
        native=False,
        speculation=speculation,
        adaptive=False,
        max_step_tokens=48,
        max_sequences=8,
    )
    capture = Recomputed()
    with_graphs(engine, monkeypatch, capture)
    results = engine.generate(PROMPTS, params)
    assert capture.captures
    assert capture.replays > capture.captures
    for prompt, own, result in zip(PROMPTS, params, results, strict=True):
        if speculation == "none" or own.temperature == 0:
            assert same(result, solo(model, prompt, own, native=False))


@pytest.mark.parametrize("rows", [None, 8])
def test_a_step_that_is_filled_up_leaves_the_cache_alone(rows, monkeypatch):
    """Spare tokens are written nowhere, and the graph reads what a step brings, not what it was captured with, also in
    passes of 8 rows, which share one."""
    plain, graphed = (Runner(make_model(5), 8, 16, native=False) for _ in range(2))
    monkeypatch.setattr(runner, "to_host", lambda step: step)
    for each in (plain, graphed):
        each.rows = rows
        each.keys.fill_(9.0)
        each.values.fill_(9.0)
    graphed.graphs = Graphs(graphed.states, Recomputed())
    for turn in range(4):
        steps = [
            Piece([turn + i for i in range(9)], 9 * turn, [6, 1, 4], 1),
            Piece(list(range(8)), 8 * turn, [2, 0], 8),
        ]
        want, got = plain.forward(steps), graphed.forward(steps)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.experts, want.experts)
    torch.testing.assert_close(graphed.keys, plain.keys, rtol=1e-5, atol=1e-5)
    assert (graphed.keys[:, [3, 5, 7]] == 9).all()


def test_a_failed_capture_says_so_and_costs_nothing(monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, params = make_model(3), SamplingParams(8, temperature=0)
    engine = Engine(model, native=False)
    with_graphs(engine, monkeypatch, refuse)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted when stream is capturing"):
        results = engine.generate(PROMPTS, params)
    assert all(
        same(result, solo(model, prompt, params, native=False)) for prompt, result in zip(PROMPTS, results, strict=True)
    )
    assert "without CUDA graphs" in engine.describe()


def test_the_graph_that_was_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr("moe_lm.engine.graphs.MOST_GRAPHS", 2)
    monkeypatch.setattr(runner, "to_host", lambda step: step)
    one = Runner(make_model(5), 8, 16, native=False)
    one.rows, capture = None, Recomputed()
    one.graphs = Graphs(one.states, capture)
    for n in (1, 1, 2, 2, 1, 3, 3, 1, 2):
        one.forward([Piece([4] * n, 0, [0], 1)])
    assert [size[0] for size in one.graphs.captured] == [1, 2]
    assert capture.captures == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_what_it_computes(dtype):
    one, two = (Runner(make_model(5, dtype).cuda(), 8, 16) for _ in range(2))
    for turn in range(5):
        steps = [Piece([turn + i for i in range(3)], 3 * turn, [6, 1], 1), Piece([turn], turn, [2], 1)]
        want = two.eager(steps) if turn == 0 else plain(two, steps)
        got = one.forward(steps)
        assert torch.equal(got.logits, want.logits.cpu())
        assert torch.equal(got.experts, want.experts.cpu())
    assert len(one.graphs.captured) == 1
    assert one.graphs.failure is None


def plain(one: Runner, steps: list[Piece]):
    """The step without a graph."""
    one.graphs.captured.clear()
    one.graphs.met.clear()
    return one.eager(steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("speculation", ["none", "draft", "ngram"])
def test_a_deterministic_gpu_gives_the_same_in_every_batch(speculation, dtype):
    model = make_model(3, dtype).cuda()
    draft = near_copy(make_model(3, dtype)).cuda()
    params = [SamplingParams(24, temperature=0, logprobs=2) for _ in PROMPTS]
    engine = Engine(
        model,
        draft=draft,
        speculation=speculation,
        adaptive=False,
        deterministic=True,
        max_step_tokens=48,
        max_sequences=8,
    )
    for prompt, own, result in zip(PROMPTS, params, engine.generate(PROMPTS, params), strict=True):
        assert same(result, solo(model, prompt, own, deterministic=True))
    assert engine.target.graphs.captured


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_a_cpu():
    steps = [Piece(list(range(1, 60)), 0, [0, 1, 2, 3], 59), Piece([3], 0, [5], 1)]
    there, here = Runner(make_model(5).cuda(), 8, 16), Runner(make_model(5), 8, 16, native=False)
    with kernels.use_backend("reference"):
        want = here.forward(steps).logits
    torch.testing.assert_close(there.forward(steps).logits, want, rtol=1e-3, atol=1e-3)
