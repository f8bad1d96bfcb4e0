"""What a server needs of the engine: refusals beforehand, prompts alone, experts, cache hits, opening, a snapshot."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from engines import BLOCK, SHAPES, VOCABULARY, drain, make_model, near_copy, no_leak, same, solo
from hub_models import SMALL
from test_imports import run_python

from moe_lm.checkpoint import load, load_tokenizer
from moe_lm.config import ConfigError
from moe_lm.data.tokenizer import end_of_text_id, train_tokenizer
from moe_lm.engine import ContextError, Engine, Output, SamplingParams, Slot, open_engine
from moe_lm.engine.stats import loads
from moe_lm.model.attention import whole_rows

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_tokens": 12, "temperature": 0}


def test_check_refuses_what_add_refuses_and_changes_nothing(tokenizer):
    engine = Engine(make_model(0, vocab_size=260), tokenizer, kv_memory=8 * BLOCK)
    params = SamplingParams(max_tokens=20)
    assert engine.context == 128
    assert engine.check("the end", params) == tokenizer.encode("the end").ids
    assert engine.check([1] * 108, params) == [1] * 108
    for prompt, own, kind in (
        ([], params, ConfigError), ([260], params, ConfigError),
        ([1], SamplingParams(speculation="draft"), ConfigError),
        ([1] * 110, params, ContextError), ([1] * 500, params, ContextError),
    ):  # fmt: skip
        for refuse in (engine.check, engine.add):
            with pytest.raises(ConfigError) as refusal:
                refuse(prompt, own)
            assert type(refusal.value) is kind
    assert not engine.has_work
    assert engine.add([1], params) == "request-0"
    engine.abort("request-0")
    drain(engine)
    no_leak(engine)
    assert Engine(make_model(0), draft=make_model(1, max_position_embeddings=64)).context == 64


def test_check_runs_beside_steps():
    engine, params = Engine(make_model(0)), SamplingParams(**GREEDY)
    expected, done, found = solo(make_model(0), [1, 2, 3], params), threading.Event(), []

    def ask():
        while not done.is_set():
            found.append(engine.check([1, 2, 3], params))

    asking = threading.Thread(target=ask)
    asking.start()
    results = engine.generate([[1, 2, 3]] * 8, params)
    done.set()
    asking.join()
    assert found == [[1, 2, 3]] * len(found) != []
    assert all(same(result, expected) for result in results)


@pytest.mark.parametrize("kind", ["none", "staged"])
@pytest.mark.parametrize("length", [1, 2, 17, 30, 512])
def test_a_prompt_alone_gives_its_log_probabilities(kind, length):
    model = make_model(1)
    prompt = torch.randint(0, VOCABULARY, (length,)).tolist()
    params = SamplingParams(max_tokens=0, prompt_logprobs=2, experts=True, speculation=kind)
    engine = Engine(model, draft=near_copy(model), adaptive=False, max_step_tokens=16, max_sequences=4)
    others = [engine.add([7, number], SamplingParams(**GREEDY)) for number in range(2)]
    request_id, plain = engine.add(prompt, params), engine.add(prompt, SamplingParams(max_tokens=0))
    results = drain(engine)
    [output], [other] = results[request_id], results[plain]
    [longer] = solo(model, prompt[:511], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert output.prompt_logprobs[:511] == longer.prompt_logprobs
    assert len(output.prompt_logprobs) == length
    assert (output.tokens, output.experts, output.text, output.finish_reason) == ([], [], "", "length")
    assert other == Output(plain, 0, cached=other.cached, finish_reason="length")
    for number, name in enumerate(others):
        assert results[name][0].tokens == solo(model, [7, number], SamplingParams(**GREEDY))[0].tokens
    assert engine.stats.tokens == 24
    # What it computed is in the prefix cache, and what was there it need not compute.
    assert engine.generate([prompt], SamplingParams(max_tokens=0))[0].samples[0].cached == (length - 1) // 16 * 16
    no_leak(engine)


def test_a_prompt_alone_whose_logits_are_not_finite_is_an_error():
    model = make_model(1)
    with torch.no_grad():
        model.embed_tokens[96] = float("nan")
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    bad, good = Engine(model, max_step_tokens=8, max_sequences=2).generate([[1, 2, 96] * 5, [1, 2]], params)
    assert bad.samples[0].finish_reason == "error"
    assert "not finite" in bad.samples[0].error
    assert good.samples[0].finish_reason == "length"


def test_several_samples_of_a_prompt_alone_are_refused():
    with pytest.raises(ConfigError, match="n = 2 samples of max_tokens = 0 are all empty; set n = 1"):
        SamplingParams(max_tokens=0, n=2)


@pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_those_of_the_plain_forward(shape, native):
    model = make_model(2, **SHAPES[shape])
    draft = near_copy(model, 0.05)
    engine = Engine(model, draft=draft, native=native, adaptive=False, max_step_tokens=9, max_sequences=6)
    prompts, params = [[1, 2, 3] * 7, [5]], SamplingParams(max_tokens=15, temperature=0, n=2, experts=True)
    for result in engine.generate(prompts, params):
        for output in result.samples:
            routings = routings_of(model, result.prompt + output.tokens[:-1])
            rows = range(len(result.prompt) - 1, len(result.prompt) + 14)
            assert output.experts == [[layer[row] for layer in routings] for row in rows]
            assert len(output.experts) == len(output.tokens) == 15
    assert engine.stats.accepted
    assert engine.generate([[1]], SamplingParams(**GREEDY))[0].samples[0].experts == []


def routings_of(model, tokens: list[int]) -> list[list[list[int]]]:
    """The experts (L, T, K) of one plain forward pass."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        routings = model.hidden_states(row, torch.arange(len(tokens))[None], whole_rows())[1]
    return [routed.routing.experts.tolist() for routed in routings]


def test_nobody_copies_experts_when_nobody_asks(monkeypatch):
    monkeypatch.setattr("moe_lm.engine.engine.note_experts", None)
    Engine(make_model(2)).generate([[1, 2]] * 3, SamplingParams(**GREEDY))


def test_hits_of_the_prefix_cache_are_reported_once_and_counted():
    model, prompt = make_model(3), list(range(50))
    engine, params = Engine(model, max_step_tokens=16, max_sequences=4), SamplingParams(**GREEDY, n=2)
    first, again = (engine.generate([prompt], params)[0].samples for _ in range(2))
    assert [(sample.cached, other.cached) for sample, other in zip(first, again, strict=True)] == [
        (0, 48),
        (None, None),
    ]
    outputs = [output for output in engine.stream(prompt, SamplingParams(**GREEDY)) if output.index == 0]
    assert [output.cached for output in outputs] == [48] + [None] * 11
    assert engine.generate([prompt], SamplingParams(**GREEDY, prompt_logprobs=0))[0].samples[0].cached == 0
    assert (engine.stats.prompt_tokens, engine.stats.cached_tokens) == (200, 96)


def test_a_start_after_a_preemption_is_no_hit():
    model = make_model(3)
    engine, params = Engine(model, kv_memory=6 * BLOCK, max_sequences=2), SamplingParams(max_tokens=40, temperature=0)
    results = engine.generate([[1] * 20, [2] * 20], params)
    assert engine.stats.preemptions
    assert engine.scheduler.pool.hits
    assert [result.samples[0].cached for result in results] == [0, 0]
    assert (engine.stats.prompt_tokens, engine.stats.cached_tokens) == (40, 0)


def test_tokens_of_each_expert_are_counted():
    model, prompt = make_model(4), [1, 2, 3, 4, 5]
    engine = Engine(model, max_step_tokens=3, max_sequences=1)
    assert engine.stats.expert_tokens is None
    [result] = engine.generate([prompt], SamplingParams(max_tokens=7, temperature=0))
    routings = np.array(routings_of(model, prompt + result.tokens[:-1]))
    expected = [[(layer == expert).sum() for expert in range(8)] for layer in routings]
    assert engine.stats.expert_tokens.tolist() == expected
    assert engine.stats.expert_tokens.dtype == np.int64
    engine.reset_stats()
    assert engine.stats.expert_tokens is None
    dense = Engine(make_model(4, **SHAPES["dense, odd sizes"]))
    dense.generate([prompt], SamplingParams(**GREEDY))
    assert dense.stats.expert_tokens is None


def test_counting_experts_is_cheap():
    """Under 50 us for 8 layers, 16 tokens, 2 of 16 experts; the fastest of many, as the machine has other work."""
    experts, fastest = torch.randint(0, 16, (8, 16, 2)), 1.0
    for _ in range(200):
        start = time.perf_counter()
        counts = loads(experts, 16)
        fastest = min(fastest, time.perf_counter() - start)
    assert counts.sum(1).tolist() == [32] * 8
    assert fastest < 50e-6


def test_an_engine_is_opened_with_tokenizer_end_tokens_and_draft(saved, tokenizer):
    engine = open_engine(saved / "mixture", saved / "mixture", draft_tokens=2, kv_memory="1MiB")
    by_hand = Engine(
        load(saved / "mixture"), load_tokenizer(saved / "mixture"), load(saved / "mixture"), draft_tokens=2,
        stop_ids=(end_of_text_id(tokenizer),),
    )  # fmt: skip
    assert engine.stop_ids == by_hand.stop_ids != frozenset()
    assert (engine.speculation, engine.lengths.most, engine.vocab_size) == ("draft", 2, SMALL["mixture"].vocab_size)
    params = SamplingParams(max_tokens=30, temperature=0)
    [result], [expected] = engine.generate(["def "], params), by_hand.generate(["def "], params)
    assert same(result, expected.samples)
    assert result.text == expected.text
    cast = open_engine(saved / "dense", dtype=torch.bfloat16, device="cpu", stop_ids=(3, 4))
    assert (cast.draft, cast.speculation, cast.stop_ids) == (None, "none", {3, 4})
    assert cast.target.model.embed_tokens.dtype == torch.bfloat16


def test_end_tokens_may_be_several_or_none(copy):
    directory = copy("mixture")
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_engine(directory).stop_ids == {5, 6}
    for name in ("generation_config.json", "config.json"):
        config = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(config | {"eos_token_id": None}))
    assert open_engine(directory).stop_ids == frozenset()


def test_a_draft_of_another_tokenizer_is_refused(saved, copy):
    other = copy("mixture")
    train_tokenizer(["other words, other pieces"] * 3, 262).save(str(other / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"the draft .* has another tokenizer than .*: train it with this one\."):
        open_engine(saved / "mixture", other)


def test_importing_the_engine_reads_no_checkpoint_code():
    run_python("import sys, moe_lm.engine; assert not {'moe_lm.checkpoint', 'safetensors'} & set(sys.modules)")


def test_a_snapshot_shows_what_runs_and_waits():
    model = make_model(7)
    engine = Engine(
        model, draft=model, adaptive=False, draft_tokens=3, max_sequences=3, max_step_tokens=20, kv_memory=80 * BLOCK
    )
    empty = engine.snapshot()
    assert (empty.running, empty.waiting, empty.slots, empty.waiting_requests) == (0, 0, [], frozenset())
    assert (empty.block_size, empty.blocks, empty.used, empty.cached) == (16, 40, 0, 0)
    params = SamplingParams(max_tokens=30, temperature=0)
    plain = SamplingParams(max_tokens=10, temperature=0, speculation="none", n=2)
    engine.add([1, 2, 3], params, "fast")
    engine.add([4] * 40, plain, "long")
    engine.add([5], params, "late")
    engine.add([6], params, "later")
    assert engine.unstarted() == {"fast", "long", "late", "later"} == engine.snapshot().waiting_requests
    engine.step()
    snapshot = engine.snapshot()
    assert snapshot.slots == [Slot("fast", 0, "decode", 4, 3, 33), Slot("long", 0, "prefill", 40, 40, 50)]
    assert (snapshot.running, snapshot.waiting, snapshot.waiting_requests) == (2, 2, {"late", "later"})
    assert (snapshot.used, snapshot.cached) == (4, 0)
    while engine.unstarted() >= {"late", "later"}:
        engine.step()
    snapshot = engine.snapshot()
    assert snapshot.slots[0].phase == "verify"
    assert snapshot.slots[1][:3] == ("long", 0, "decode")
    # The second sample of `long` has no room yet, but its request has started.
    assert [slot.request_id for slot in snapshot.slots] == ["fast", "long", "late"]
    assert (snapshot.waiting, snapshot.waiting_requests) == (2, {"later"})
    while engine.has_work:
        engine.step()
        assert engine.unstarted() == engine.snapshot().waiting_requests
    snapshot = engine.snapshot()
    # Full blocks: two of `fast`, three of `long`, whose samples are equal, one of each of the others.
    assert (snapshot.running, snapshot.used, snapshot.waiting_requests) == (0, 0, frozenset())
    assert snapshot.cached == 7
