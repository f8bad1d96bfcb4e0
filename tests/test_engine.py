"""The engine alone against the plain forward pass: one request, its sampling, its ends, its refusals."""

import math

import pytest
import torch
from engines import SHAPES, VOCABULARY, make_model, near_copy, no_leak, same, solo
from tokenizers import Tokenizer

from moe_lm.config import ConfigError
from moe_lm.data import train_tokenizer
from moe_lm.engine import Engine, SamplingParams, TextStream
from moe_lm.engine.batch import Piece
from moe_lm.engine.runner import Ahead, Runner
from moe_lm.model.attention import whole_rows

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("none", "ngram", "draft", "staged")
NATIVE = pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])


def teacher_forced(model, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) after each token, of one plain forward pass."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens]))[0], dim=1)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_computes_the_plain_forward(shape, native):
    model = make_model(0, **SHAPES[shape])
    prompt = torch.randint(0, VOCABULARY, (45,)).tolist()
    params = SamplingParams(max_tokens=12, seed=3, logprobs=5, prompt_logprobs=2)
    engine = Engine(model, native=native, max_sequences=4, max_step_tokens=16)
    [output] = engine.generate([prompt], params)[0].samples
    truth = teacher_forced(model, prompt + output.tokens)
    assert output.prompt_logprobs[0] is None
    for i, given in enumerate([*output.prompt_logprobs[1:], *output.logprobs]):
        assert given.token == (prompt + output.tokens)[i + 1]
        assert given.logprob == pytest.approx(truth[i, given.token].item(), abs=1e-4)
        best = truth[i].topk(len(given.top)).values.tolist()
        assert [value for _, value in given.top] == pytest.approx(best, abs=1e-4)
        assert len(given.top) == (2 if i < len(prompt) - 1 else 5)
    assert len(output.tokens) == 12
    assert output.finish_reason == "length"
    no_leak(engine)


@NATIVE
@pytest.mark.parametrize("shape", ["first layer dense", "every second layer dense"])
def test_a_model_with_dense_layers_beside_routing_ones_writes_what_it_is_forced_to(shape, native):
    model = make_model(6, **SHAPES[shape])
    prompt = torch.randint(0, VOCABULARY, (20,)).tolist()
    engine = Engine(model, native=native)
    [output] = engine.generate([prompt], SamplingParams(max_tokens=16, temperature=0, experts=True))[0].samples
    tokens = prompt + output.tokens
    assert output.tokens == teacher_forced(model, tokens)[len(prompt) - 1 : -1].argmax(1).tolist()
    positions = torch.arange(len(tokens) - 1)[None]
    with torch.no_grad():
        [routed] = model.hidden_states(torch.tensor([tokens[:-1]]), positions, whole_rows())[1]
    chosen = routed.routing.experts[len(prompt) - 1 :]
    assert [sorted(layer) for [layer] in output.experts] == chosen.sort().values.tolist()
    assert engine.stats.expert_tokens.shape == (1, 8)
    assert engine.stats.expert_tokens.sum() == (len(tokens) - 1) * routed.routing.experts.shape[1]


@NATIVE
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("draft", ["another model", "the model itself", "a near copy"])
def test_greedy_speculation_changes_no_bit(kind, draft, native):
    model = make_model(4)
    other = {"another model": make_model(5), "the model itself": model, "a near copy": near_copy(model)}[draft]
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=2)
    engine = Engine(model, draft=other, speculation=kind, draft_tokens=5, adaptive=False, native=native)
    prompts = [[1], [7] * 70]
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        assert same(result, solo(model, prompt, params, native=native))
    if draft == "the model itself" and kind != "ngram":
        assert engine.stats.acceptance == 1
        assert engine.stats.tokens_per_step == pytest.approx(2 * 23 / (2 * math.ceil(23 / 6)))
    if kind == "ngram":
        assert engine.stats.proposed
    no_leak(engine)


def test_a_draft_that_agrees_needs_fewer_steps_and_is_counted_by_place():
    model = make_model(6)
    engine = Engine(model, draft=near_copy(model, 0.05), draft_tokens=3, adaptive=False)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=41, temperature=0))
    stats = engine.stats
    [proposed], [accepted] = stats.proposed_at.values(), stats.accepted_at.values()
    assert stats.tokens == 41
    assert stats.decoded == 40 == stats.accepted + stats.decodes
    assert len(proposed) == 3
    assert all(a <= p for a, p in zip(accepted, proposed, strict=True))
    assert accepted == sorted(accepted, reverse=True)
    assert stats.verifies == proposed[0] > 0
    assert stats.steps == stats.decodes + 1
    assert 0.5 < stats.acceptance < 1
    touched = {n: total / stats.decodes_of[n] for n, total in stats.experts_touched.items()}
    assert touched[4] > 2, "a draft of 3 touches more than one token's 2 experts"
    assert set(stats.seconds) == {"schedule", "draft", "forward", "sample", "output"}


def test_the_draft_length_is_learned_and_reported():
    model = make_model(16)
    prompts, params = [[i, 2, 3] for i in range(3)], SamplingParams(max_tokens=120, temperature=0)
    engine = Engine(model, draft=model, draft_tokens=4)
    results = engine.generate(prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == solo(model, prompt, params)[0].tokens
    report = engine.speculation_reports()["draft"]
    assert 0 < report.probes <= report.steps
    assert report.acceptance_at[0] == 1
    assert report.cost_ratio > 0
    assert engine.stats.proposed_at["draft"] == report.proposed_at[: len(engine.stats.proposed_at["draft"])]
    assert engine.warm_up_seconds > 0


def test_seeds_repeat_differ_and_belong_to_samples():
    model = make_model(10)
    prompts = [[1, 2], [5] * 20]
    params = [SamplingParams(max_tokens=20, seed=seed, n=3) for seed in (3, 4)]
    first, second = Engine(model).generate(prompts, params), Engine(model).generate(prompts[::-1], params[::-1])
    assert [result.samples for result in first] != [result.samples for result in second[::-1]], "the ids differ"
    for one, other in zip(first, second[::-1], strict=True):
        assert same(one, other.samples)
    tokens = [output.tokens for result in first for output in result.samples]
    assert len(set(map(tuple, tokens))) == 6
    assert tokens[0] == solo(model, prompts[0], SamplingParams(max_tokens=20, seed=3))[0].tokens


def test_end_tokens_stop_in_the_middle_of_a_draft():
    model = make_model(11)
    params = SamplingParams(max_tokens=60, temperature=0)
    free = solo(model, [5], params)[0].tokens
    end = free[17]
    cut = free[: free.index(end) + 1]
    for draft in (None, model):
        settings = {"draft": draft, "adaptive": False}
        [result] = Engine(model, stop_ids=(end,), **settings).generate([[5]], params)
        assert (result.tokens, result.samples[0].finish_reason) == (cut, "stop")
        assert result.samples[0].stop_reason == end
        [result] = Engine(model, **settings).generate([[5]], SamplingParams(60, temperature=0, stop_token_ids=[end]))
        assert result.tokens == cut
        [result] = Engine(model, stop_ids=(end,), **settings).generate(
            [[5]], SamplingParams(60, temperature=0, ignore_eos=True)
        )
        assert (result.tokens, result.samples[0].finish_reason) == (free, "length")


def test_penalties_and_bias_hold_under_speculation():
    model, draft = make_model(6), make_model(7)
    for changes in ({"repetition_penalty": 1.5}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.0},
                    {"logit_bias": {7: 5.0, 9: -100.0}}):  # fmt: skip
        params = SamplingParams(max_tokens=40, temperature=0, **changes)
        expected = solo(model, [1, 2, 3], params)
        assert expected[0].tokens != solo(model, [1, 2, 3], SamplingParams(40, temperature=0))[0].tokens
        for kind in KINDS:
            engine = Engine(model, draft=draft, speculation=kind, adaptive=False)
            assert same(engine.generate([[1, 2, 3]], params)[0], expected)


def test_stream_and_step_give_what_generate_gives(tokenizer):
    model = make_model(12, vocab_size=300)
    params = SamplingParams(max_tokens=25, temperature=0.8, seed=5, logprobs=0)
    engine = Engine(model, tokenizer, draft=near_copy(model), adaptive=False)
    [whole] = engine.generate(["the end"], params)
    outputs = list(engine.stream("the end", params))
    assert [token for output in outputs for token in output.tokens] == whole.tokens
    assert "".join(output.text for output in outputs) == whole.text
    assert len(outputs) > 1
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert all(len(o.tokens) == len(o.sources) == len(o.logprobs) for o in outputs)
    assert {source for output in outputs for source in output.sources} <= {"target", "draft"}
    assert whole.prompt == tokenizer.encode("the end").ids
    request_id = engine.add("the end", params, "mine")
    assert request_id == "mine"
    with pytest.raises(ConfigError, match="request_id = 'mine' is taken"):
        engine.add("the end", params, "mine")
    found = []
    while engine.has_work:
        found += engine.step()
    assert [token for output in found for token in output.tokens] == whole.tokens
    no_leak(engine)


def test_a_stream_that_is_closed_ends_its_request():
    engine = Engine(make_model(0))
    other = engine.add([1, 2], SamplingParams(max_tokens=5, temperature=0))
    stream = engine.stream([3, 4], SamplingParams(max_tokens=100, temperature=0))
    next(stream)
    stream.close()
    found = []
    while engine.has_work:
        found += engine.step()
    assert [output.finish_reason for output in found if output.request_id != other] == ["abort"]
    tokens = [token for output in found if output.request_id == other for token in output.tokens]
    assert tokens == solo(make_model(0), [1, 2], SamplingParams(max_tokens=5, temperature=0))[0].tokens
    no_leak(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_cut_the_output_at_any_place_of_a_draft(tokenizer, kind):
    model = make_model(13, vocab_size=300)
    free = Engine(model, tokenizer).generate(["the"], SamplingParams(max_tokens=40, temperature=0))[0]
    for start in range(2, len(free.text) - 6, 5):
        stop = free.text[start : start + 3]
        params = SamplingParams(max_tokens=40, temperature=0, stop=(stop, "never"))
        engine = Engine(model, tokenizer, draft=near_copy(model), speculation=kind, adaptive=False)
        [output] = engine.generate(["the"], params)[0].samples
        assert output.text == free.text[: free.text.index(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.tokens == free.tokens[: len(output.tokens)]
        before = TextStream(tokenizer, params.stop)
        before.push(output.tokens[:-1])
        assert not before.stopped, "the token that completes the stop text is the last"


@NATIVE
def test_a_logit_that_is_not_finite_fails_its_request_alone(native):
    model = make_model(14)
    with torch.no_grad():
        model.embed_tokens[96] = float("nan")
    params = SamplingParams(max_tokens=12, temperature=0, n=2)
    engine = Engine(model, native=native, draft=near_copy(make_model(14)), adaptive=False)
    bad, good = engine.generate([[1, 96, 2], [1, 2, 3]], params)
    assert [output.finish_reason for output in bad.samples] == ["error", "error"]
    assert "not finite" in bad.samples[0].error
    assert bad.samples[0].tokens == []
    assert same(good, solo(make_model(14), [1, 2, 3], params, native=native))
    no_leak(engine)


def test_the_tokens_before_a_bad_logit_are_the_same_with_and_without_a_draft():
    """The model runs into a token that it cannot read; the draft guesses on past it."""
    clean, model = make_model(15), make_model(15)
    free = solo(clean, [1, 2], SamplingParams(max_tokens=20, temperature=0))[0].tokens
    bad = next(token for i, token in enumerate(free) if i > 4 and token not in (1, 2, *free[:i]))
    with torch.no_grad():
        model.embed_tokens[bad] = float("nan")
    params = SamplingParams(max_tokens=20, temperature=0)
    for draft in (None, clean):
        [output] = Engine(model, draft=draft, adaptive=False).generate([[1, 2]], params)[0].samples
        assert output.tokens == free[: free.index(bad) + 1]
        assert output.finish_reason == "error"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([97], {}, "the prompt holds token id 97, outside 0 to 96"),
        ([1], {"logit_bias": {-1: 2.0}}, "logit_bias holds token id -1"),
        ([1], {"stop_token_ids": (200,)}, "stop_token_ids holds token id 200"),
        ([1] * 500, {"max_tokens": 100}, "500 tokens of prompt and max_tokens = 100 make 600, more than .* 512"),
        ([1], {"stop": "x"}, "stop texts need a tokenizer"),
        ([1], {"speculation": "staged"}, "speculation = 'staged' needs a draft model"),
        ("text", {}, "the prompt is text and the engine has no tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused(prompt, params, message):
    engine = Engine(make_model(0))
    with pytest.raises(ConfigError, match=message):
        engine.generate([[1, 2], prompt], SamplingParams(**params) if params.get("stop") is None or prompt else None)
    while engine.has_work:
        engine.step()
    no_leak(engine)


def test_a_request_that_the_cache_can_never_hold_is_refused_with_the_numbers():
    engine = Engine(make_model(0), kv_memory=4 * 16 * 2 * 2 * 16 * 4)
    assert engine.scheduler.pool.num_blocks == 4
    with pytest.raises(ConfigError, match=r"need 5 cache blocks of 16 tokens, more than the 4 that kv_memory holds"):
        engine.add([1] * 60, SamplingParams(max_tokens=10))
    engine.add([1] * 55, SamplingParams(max_tokens=10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": make_model(0, vocab_size=50)}, "vocab_size = 50 is not the model's 97"),
        ({"draft_tokens": 0}, "draft_tokens = 0 must be between 1 and 16"),
        ({"kv_memory": "many"}, "kv_memory = 'many' is no size; write it as 2GiB"),
        ({"kv_memory": 100}, "kv_memory = 100 holds no cache block, of 4096 bytes"),
        ({"speculation": "draft"}, "speculation = 'draft' needs a draft model"),
        ({"speculation": "oracle"}, "speculation = 'oracle' is unknown; choose from none, ngram"),
        ({"max_sequences": 0}, "max_sequences = 0 must be at least 1"),
        ({"max_step_tokens": 8, "max_sequences": 16}, "max_step_tokens = 8 must be at least max_sequences = 16"),
        ({"native": True, "kv_dtype": torch.float16}, "native = True is asked for and cannot be: the cache is"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Engine(make_model(0), **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", -1), ("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0),
     ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("temperature", float("inf")), ("seed", -1), ("n", 0),
     ("n", 1000), ("presence_penalty", 3), ("frequency_penalty", -2.5), ("logprobs", 65), ("draft_tokens", 17)],
)  # fmt: skip
def test_bad_sampling_parameters_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        SamplingParams(**{name: value})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["héllo wörld 🙂 end of the story. The end."] * 5, 300)


@pytest.mark.parametrize(
    "text", ["plain", "héllo 🙂 wörld", "The end. STOP here", "STO ST STOP", "aSTOaSTOPb", "🙂STOP"]
)
@pytest.mark.parametrize("stop", [(), ("STOP",), ("here", "STOP", "")])
def test_streamed_text_is_the_whole_text_up_to_the_stop(tokenizer, text, stop):
    ends = {text.find(each): each for each in stop if each and each in text}
    expected = text[: min(ends)] if ends else text
    tokens = tokenizer.encode(text).ids
    for size in (1, 2, 3, len(tokens)):
        stream, shown = TextStream(tokenizer, stop), ""
        for start in range(0, len(tokens), size):
            shown += stream.push(tokens[start : start + size])
            assert expected.startswith(shown)
            if stream.stopped:
                break
        assert shown + stream.finish() == expected
        assert stream.found == (ends[min(ends)] if ends else None)


@pytest.mark.parametrize("counts", [[1, 3, 6], [4, 4, 4]])
@pytest.mark.parametrize("temperatures", [[0, 0, 0], [0.9, 0, 1.3]])
def test_the_native_guess_is_that_of_one_step_after_another(counts, temperatures):
    """Three sequences, one that has much to read, guess as many tokens as they want across a block's end."""
    model = make_model(17)
    pieces = [Piece([1, 2, 3], 0, [4, 1], 1), Piece(list(range(30)), 0, [0, 2, 3], 1), Piece([5] * 13, 0, [6, 5], 1)]
    native, eager = (Runner(model, 8, 16, native=native) for native in (True, False))
    numbers = (0.3, 0.8, 0.1, 0.6, 0.45, 0.97)
    wanted = [Ahead(n, temperature, numbers[:n]) for n, temperature in zip(counts, temperatures, strict=True)]
    found, laws = zip(*native.guess(pieces, wanted), strict=True)
    found_in_turn, laws_in_turn = zip(*eager.guess(pieces, wanted), strict=True)
    assert found == found_in_turn
    torch.testing.assert_close(laws, laws_in_turn, atol=1e-5, rtol=1e-4)
    assert [len(tokens) for tokens in found] == counts
    # The cache holds what was guessed: the next step goes on from there.
    for runner in (native, eager):
        rest = [
            Piece(t[-1:], p.start + len(p.tokens) + len(t) - 1, p.blocks, 1) for p, t in zip(pieces, found, strict=True)
        ]
        whole = Runner(model, 8, 16, native=runner is native)
        all_at_once = [Piece(p.tokens + t, 0, p.blocks, 1) for p, t in zip(pieces, found, strict=True)]
        assert torch.equal(runner.forward(rest).logits, whole.forward(all_at_once).logits)


@NATIVE
def test_a_guess_ends_where_the_draft_model_has_no_logits(native):
    model = make_model(18)
    tokens = Runner(model, 4, 16, native=native).guess([Piece([1, 2], 0, [0], 1)], [Ahead(6)])[0][0]
    bad = next(i for i, token in enumerate(tokens) if token not in (1, 2, *tokens[:i]) and i > 0)
    with torch.no_grad():
        model.embed_tokens[tokens[bad]] = float("nan")
    assert Runner(model, 4, 16, native=native).guess([Piece([1, 2], 0, [0], 1)], [Ahead(6)])[0][0] == tokens[: bad + 1]


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_broken_draft_model_fails_nobody(kind, temperature):
    model, draft = make_model(19), make_model(19)
    with torch.no_grad():
        draft.norm.weight.fill_(float("nan"))
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=2)
    engine = Engine(model, draft=draft, speculation=kind, adaptive=False)
    assert same(engine.generate([[1, 2, 3] * 4], params)[0], solo(model, [1, 2, 3] * 4, params))
    no_leak(engine)


def test_falling_back_says_so(monkeypatch):
    monkeypatch.setattr("moe_lm.engine.runner.why_not", lambda *_: "there is no compiler")
    with pytest.warns(UserWarning, match="PyTorch code in passes of 8 rows.*no native step: there is no compiler"):
        Engine(make_model(0))
