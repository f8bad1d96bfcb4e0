"""What a request gets is what it gets alone: in any company, under any pressure, with any two features at once."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from engines import BLOCK, VOCABULARY, make_model, near_copy, no_leak, same, solo

from moe_lm.engine import Engine, Output, Result, SamplingParams
from moe_lm.engine.drafting import Drafter
from moe_lm.engine.sample import Sample
from moe_lm.engine.sequence import Sequence
from moe_lm.engine.speculative import Draft
from moe_lm.model import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")


class Crowd:
    """Requests that come, go and are taken back at random, and what each must get."""

    def __init__(self, model: Transformer, seed: int, kinds: tuple[str, ...], settings: dict):
        self.model, self.random, self.kinds, self.settings = model, random.Random(seed), kinds, settings
        self.prefixes = [[self.random.randrange(VOCABULARY) for _ in range(40)] for _ in range(3)]
        self.expected: dict[tuple, list] = {}
        self.asked: dict[str, tuple] = {}
        self.got: dict[str, Result] = {}

    def arrive(self, engine: Engine) -> None:
        choose = self.random
        start = choose.choice(self.prefixes)[: choose.choice([0, 16, 33, 40])]
        prompt = start + [choose.randrange(VOCABULARY) for _ in range(choose.randrange(1, 30))]
        kind = choose.choice(self.kinds)
        temperature = choose.choice([0, 0.9])
        # Which tokens a seed draws depends on which guesses there were, but for these; their law does not.
        reproducible = bool(temperature) and kind != "none" and not engine.deterministic
        max_tokens = choose.randrange(40)
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=choose.randrange(5),
            n=choose.choice([1, 1, 1, 3]) if max_tokens else 1, experts=choose.random() < 0.3,
            logprobs=choose.choice([None, 0, 3]), prompt_logprobs=choose.choice([None, None, 2]),
            repetition_penalty=choose.choice([1, 1, 1.3]), frequency_penalty=choose.choice([0, 0, 0.5]),
            top_p=choose.choice([1, 0.8]), reproducible=reproducible,
            stop_token_ids=choose.choice([(), (5, 6, 7)]), speculation=kind, draft_tokens=choose.randrange(1, 7),
        )  # fmt: skip
        request_id = engine.add(prompt, params)
        self.asked[request_id] = (prompt, params)
        self.got[request_id] = Result(request_id, prompt, [Output(request_id, i) for i in range(params.n)])

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.got[output.request_id].samples[output.index].extend(output)

    def truth(self, request_id: str) -> list[Output]:
        """What a request gets alone, without speculation."""
        prompt, params = self.asked[request_id]
        params = replace(params, speculation="none")
        key = (tuple(prompt), str(params))
        if key not in self.expected:
            self.expected[key] = solo(self.model, prompt, params, **self.settings)
        return self.expected[key]

    def check(self) -> int:
        """Hold every request that was not aborted to its truth; how many there were."""
        checked = 0
        for request_id, result in self.got.items():
            if all(output.finish_reason != "abort" for output in result.samples):
                assert same(result, self.truth(request_id)), self.asked[request_id]
                checked += 1
        return checked


class Oracle:
    """A drafter whose guesses are right for a random number of places and random after that."""

    def __init__(self, drafter: Drafter, crowd: Crowd):
        self.drafter, self.crowd, self.read, self.right = drafter, crowd, drafter.read, set()

    def propose(self, wanted: list[tuple[Sample, int]]) -> list[Draft]:
        return [self.guess(sample.sequence, k) for sample, k in wanted]

    def guess(self, sequence: Sequence, k: int) -> Draft:
        truth = self.crowd.truth(sequence.request_id)[sequence.index].tokens[len(sequence.output) :]
        right = self.crowd.random.randrange(k + 1)
        self.right.add(right)
        wrong = [self.crowd.random.randrange(VOCABULARY) for _ in range(k)]
        return Draft((truth[:right] + wrong)[:k], None, ["draft"] * k)


def drive(steps: int, seed: int, dtype: torch.dtype, blocks: int = 9, **settings) -> Engine:
    """Run a crowd through a small cache for `steps` steps and the rest of its work."""
    model = make_model(seed, dtype)
    kinds = ("none", "ngram", "draft", "staged")
    engine = Engine(
        model, draft=near_copy(model), kv_memory=2 * blocks * BLOCK * dtype.itemsize // 4, max_sequences=6,
        max_step_tokens=24, adaptive=False, **settings,
    )  # fmt: skip
    crowd = Crowd(model, seed, kinds, settings)
    own, oracle = engine.drafter, Oracle(engine.drafter, crowd)
    for step in range(steps):
        if len(engine.requests) < 9 and crowd.random.random() < 0.3:
            crowd.arrive(engine)
        if engine.requests and crowd.random.random() < 0.01:
            engine.abort(crowd.random.choice(list(engine.requests)))
        engine.drafter = oracle if step // 50 % 2 else own
        crowd.take(engine.step())
        engine.scheduler.pool.check()
    while engine.has_work:
        crowd.take(engine.step())
    assert crowd.check() > steps / 40
    assert oracle.right == set(range(7)) or steps < 1000
    no_leak(engine)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_crowd_gets_what_each_gets_alone(dtype):
    engine = drive(1500, 1, dtype)
    assert engine.scheduler.pool.hits > 0
    assert engine.stats.preemptions > 20
    assert engine.stats.copies > 10


def test_a_deterministic_crowd_draws_the_same_tokens_with_any_speculation():
    engine = drive(700, 5, torch.bfloat16, deterministic=True)
    assert {kind for kind in engine.stats.accepted_at if engine.stats.accepted_at[kind]} == {"ngram", "draft", "staged"}


def test_a_crowd_gets_what_each_gets_alone_without_the_native_step():
    drive(120, 2, torch.float32, native=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ten_thousand_steps_of_a_crowd(dtype, seed):
    drive(10_000, seed, dtype, deterministic=seed == 4)


class Run(NamedTuple):
    """An engine after it has served some prompts."""

    model: Transformer
    engine: Engine
    params: list[SamplingParams]
    results: list[Result]

    def guessed(self, kind: str) -> bool:
        return sum(self.engine.stats.proposed_at.get(kind, [])) > 0

    def penalised(self) -> bool:
        """Whether penalties changed what at least one request got."""
        return any(
            not same(result, alone(self.model, result.prompt, replace(own, **UNPENALISED, speculation="none")))
            for result, own in zip(self.results, self.params, strict=True)
        )

    def samples(self) -> list[Output]:
        return [sample for result in self.results for sample in result.samples]


class Feature(NamedTuple):
    settings: dict
    """Of the engine."""
    params: dict
    """Of every request; of every other one where two features disagree."""
    happened: Callable[[Run], bool]


PENALTIES = {"repetition_penalty": 1.02, "presence_penalty": 0.1, "frequency_penalty": 0.1}
UNPENALISED = dict.fromkeys(PENALTIES, 0) | {"repetition_penalty": 1}
FEATURES = {
    "prefix cache": Feature({"prefix_cache": True}, {}, lambda run: run.engine.scheduler.pool.hits > 0),
    "draft": Feature({}, {"speculation": "draft"}, lambda run: run.guessed("draft")),
    "n-gram": Feature({}, {"speculation": "ngram"}, lambda run: run.guessed("ngram")),
    "staged": Feature({}, {"speculation": "staged"}, lambda run: run.guessed("staged")),
    "chunks": Feature({"max_step_tokens": 18}, {}, lambda run: run.engine.stats.chunks > 0),
    "preemption": Feature({"kv_memory": 2 * 11 * BLOCK}, {}, lambda run: run.engine.stats.preemptions > 0),
    "penalties": Feature({}, PENALTIES, lambda run: run.penalised()),
    "logprobs": Feature({}, {"logprobs": 3}, lambda run: all(len(s.logprobs) == 30 for s in run.samples())),
    "prompt logprobs": Feature({}, {"prompt_logprobs": 2}, lambda run: run.results[0].samples[0].prompt_logprobs),
    "experts": Feature({}, {"experts": True}, lambda run: all(len(s.experts) == 30 for s in run.samples())),
    "several samples": Feature({}, {"n": 3}, lambda run: run.engine.stats.copies > 0),
}


@pytest.mark.parametrize(("one", "other"), list(combinations(FEATURES, 2)))
def test_two_features_at_once_change_nothing(one, other, pair):
    model, draft = pair
    first, second = FEATURES[one], FEATURES[other]
    engine = Engine(
        model, draft=draft, adaptive=False, max_sequences=12, speculation="none",
        **{"prefix_cache": False, "max_step_tokens": 256} | first.settings | second.settings,
    )  # fmt: skip
    base = {"max_tokens": 30, "temperature": 0}
    mixes = [base | second.params | first.params, base | first.params | second.params]
    # Prompts of which the cache can be used need requests that do not ask for the prompt's own numbers.
    if {one, other} == {"prefix cache", "prompt logprobs"}:
        mixes[1] = base
    prompts = [[3, 1, 4, 1, 5] * 8 + [number] * (number + 1) for number in range(6)]
    params = [SamplingParams(**mixes[i % 2]) for i in range(6)]
    # The second half finds what the first has left in the cache.
    results = engine.generate(prompts[:3], params[:3]) + engine.generate(prompts[3:], params[3:])
    for prompt, own, result in zip(prompts, params, results, strict=True):
        assert same(result, alone(model, prompt, replace(own, speculation="none")))
    run = Run(model, engine, params, results)
    assert first.happened(run)
    assert second.happened(run)
    no_leak(engine)


@pytest.fixture(scope="module")
def pair():
    model = make_model(20)
    return model, near_copy(model)


SOLO: dict[str, list[Output]] = {}


def alone(model, prompt: list[int], params: SamplingParams) -> list[Output]:
    """What each request of the pairs gets alone, computed once."""
    key = str((prompt, params))
    if key not in SOLO:
        SOLO[key] = solo(model, prompt, params)
    return SOLO[key]
