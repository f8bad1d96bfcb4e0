"""Cached and speculative decoding against the plain forward pass and against exact laws."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer

from moe_lm.config import ConfigError, ModelConfig
from moe_lm.data import train_tokenizer
from moe_lm.engine import Generator, SamplingParams, TextStream, speculative
from moe_lm.engine.cache import PAGE_SIZE
from moe_lm.engine.runner import PREFILL_ROWS, Runner
from moe_lm.engine.sampler import draw, probabilities
from moe_lm.model import Transformer

SHAPES = {
    "moe, one kv head": {},
    "moe, shared expert, top-3": {"n_shared_experts": 1, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "dense, odd sizes": {"num_local_experts": 0, "hidden_size": 60, "num_attention_heads": 3, "head_dim": 22},
}


def make_model(seed: int, **changes) -> Transformer:
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_local_experts": 8, "max_position_embeddings": 2048, "initializer_range": 0.2,
    } | changes  # fmt: skip
    return Transformer(ModelConfig(**shape)).reset_parameters(torch.Generator().manual_seed(seed)).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decoding_computes_the_plain_forward(shape):
    model = make_model(0, **SHAPES[shape])
    tokens = torch.randint(0, 97, (1, 2 * PAGE_SIZE + 9))
    with torch.no_grad():
        whole = model(tokens)[0]
    runner = Runner(model, tokens.shape[1])
    first = runner.forward(tokens[0, :40].tolist())
    rest = torch.cat([runner.forward([token]) for token in tokens[0, 40:].tolist()])
    torch.testing.assert_close(torch.cat([first, rest]), whole[39:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 5, 8, 13])
def test_a_token_has_the_same_bits_alone_and_in_a_draft(shape, size):
    model = make_model(1, **SHAPES[shape])
    tokens = torch.randint(0, 97, (PAGE_SIZE + 40,)).tolist()
    alone, together = Runner(model, 200), Runner(model, 200)
    alone.forward(tokens[:50])
    together.forward(tokens[:50])
    one = torch.cat([alone.forward([token]) for token in tokens[50:]])
    parts = [tokens[i : i + size] for i in range(50, len(tokens), size)]
    many = torch.cat([together.forward(part, last=len(part)) for part in parts])
    assert torch.equal(one, many)


def test_a_truncated_cache_forgets():
    model = make_model(2)
    runner = Runner(model, 300)
    runner.forward(list(range(90)))
    expected = runner.forward([5, 6, 7], last=3)
    runner.truncate(90)
    runner.forward([50, 51, 52, 53, 54])
    runner.truncate(90)
    assert torch.equal(runner.forward([5, 6, 7], last=3), expected)


def test_a_long_prompt_is_read_in_pieces():
    model = make_model(3)
    tokens = torch.randint(0, 97, (2 * PREFILL_ROWS + 3,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, -1:]
    torch.testing.assert_close(Runner(model, len(tokens)).forward(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draft_tokens", [4, 9])
@pytest.mark.parametrize("draft", ["another model", "the model itself", "a near copy"])
def test_greedy_speculation_changes_no_token(shape, draft_tokens, draft):
    model = make_model(4, **SHAPES[shape])
    other = make_model(5, **SHAPES[shape])
    if draft == "the model itself":
        other = model
    elif draft == "a near copy":
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.lm_head.weight += 0.1 * torch.randn_like(other.lm_head.weight)
    params = SamplingParams(max_tokens=40, temperature=0)
    for prompt in ([1], [7] * 70):
        plain = Generator(model).generate(prompt, params)
        fast = Generator(model, other, draft_tokens).generate(prompt, params)
        assert fast.tokens == plain.tokens
        assert plain.stats.steps == 39
        if draft == "the model itself":
            assert fast.stats.acceptance == 1
            assert fast.stats.steps == math.ceil(39 / (draft_tokens + 1))


def test_penalties_and_filters_hold_under_greedy_speculation():
    model, draft = make_model(6), make_model(7)
    params = SamplingParams(max_tokens=50, temperature=0, repetition_penalty=1.5)
    plain = Generator(model).generate([1, 2, 3], params)
    assert Generator(model, draft, 4).generate([1, 2, 3], params).tokens == plain.tokens
    assert plain.tokens != Generator(model).generate([1, 2, 3], SamplingParams(max_tokens=50, temperature=0)).tokens


SMALL = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
SAMPLED = SamplingParams(max_tokens=6, temperature=1.3, repetition_penalty=1.2, min_p=0.02)


def exact_law(model: Transformer, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `length` tokens, one plain forward pass at a time."""
    law = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, mass in law.items():
            sequence = [*prompt, *tokens]
            with torch.no_grad():
                logits = model(torch.tensor([sequence]))[0, -1:]
            for token, p in enumerate(probabilities(logits, SAMPLED, [sequence])[0].tolist()):
                longer[*tokens, token] = mass * p
        law = longer
    return law


def p_value(law: dict[tuple[int, ...], float], counts: Counter) -> float:
    total = counts.total()
    likely = [key for key, p in law.items() if p * total >= 5]
    observed, expected = [counts[key] for key in likely], [law[key] * total for key in likely]
    rest = total - sum(expected)
    if rest >= 5:
        observed.append(total - sum(observed))
        expected.append(rest)
    else:
        expected = [e * sum(observed) / sum(expected) for e in expected]
    return chisquare(observed, expected).pvalue


def sampled_counts(model: Transformer, draft: Transformer, number: int) -> Counter:
    """Tokens 2 to 4 of 6, which one verified draft of up to 4 brings, with the first one before them."""
    generator = Generator(model, draft, 4)
    counts: Counter = Counter()
    for seed in range(number):
        tokens = generator.generate([1, 2], SamplingParams(**(vars(SAMPLED) | {"seed": seed}))).tokens
        counts[tuple(tokens[1:4])] += 1
    return counts


@pytest.fixture(scope="module")
def small_pair():
    return make_model(8, **SMALL), make_model(9, **SMALL)


@pytest.fixture(scope="module")
def law_of_three(small_pair):
    law: Counter = Counter()
    for tokens, p in exact_law(small_pair[0], [1, 2], 4).items():
        law[tokens[1:]] += p
    return law


def test_sampled_speculation_has_the_targets_law(small_pair, law_of_three):
    counts = sampled_counts(*small_pair, 1000)
    assert p_value(law_of_three, counts) > 1e-3


def test_a_broken_acceptance_rule_shows(small_pair, law_of_three, monkeypatch):
    """The test above can fail: accepting everything, or replacing from the target itself, is found out."""

    def accept_all(draft, target, tokens, uniforms):
        return len(tokens), draw(target[len(tokens)], uniforms[-1])

    monkeypatch.setattr("moe_lm.engine.generator.accept", accept_all)
    assert p_value(law_of_three, sampled_counts(*small_pair, 500)) < 1e-6


def accepted_law(rule, trials: int) -> float:
    """p-value of the first three tokens that `rule` gives for fixed random rows, against the target's rows."""
    rows = torch.rand(4, 3, generator=torch.Generator().manual_seed(3)) ** 2
    target, other = rows / rows.sum(1, keepdim=True), rows.flip(1) / rows.sum(1, keepdim=True)
    law = {
        key: math.prod(target[i, token].item() for i, token in enumerate(key))
        for key in itertools.product(range(3), repeat=3)
    }
    random_ = random.Random(0)
    counts: Counter = Counter()
    for _ in range(trials):
        tokens = [draw(other[i], random_.random()) for i in range(3)]
        count, token = rule(other[:3], target, tokens, [random_.random() for _ in range(4)])
        emitted = [*tokens[:count], token]
        # What the step did not reach is drawn plainly, as later steps would.
        emitted += [draw(target[i], random_.random()) for i in range(len(emitted), 3)]
        counts[tuple(emitted[:3])] += 1
    return p_value(law, counts)


def test_accept_gives_the_targets_law():
    assert accepted_law(speculative.accept, 6000) > 1e-3


@pytest.mark.parametrize("fault", ["accepts all", "replaces from the target", "compares the wrong way"])
def test_faults_in_accept_show(fault):
    def rule(draft, target, tokens, uniforms):
        for i, token in enumerate(tokens):
            p, q = target[i, token].item(), draft[i, token].item()
            rejected = {"accepts all": False, "compares the wrong way": uniforms[i] * p >= q}.get(
                fault, uniforms[i] * q >= p
            )
            if rejected:
                residual = target[i] if fault == "replaces from the target" else (target[i] - draft[i]).clamp(min=0)
                return i, draw(residual if residual.any() else target[i], uniforms[-1])
        return len(tokens), draw(target[len(tokens)], uniforms[-1])

    assert accepted_law(rule, 6000) < 1e-6


def test_accept_on_certainties():
    one_hot = torch.eye(3)
    assert speculative.accept(one_hot[:2], one_hot, [0, 1], [0.999, 0.999, 0.5]) == (2, 2)
    assert speculative.accept(one_hot[:2], one_hot, [1, 1], [0.0, 0.0, 0.5]) == (0, 0)
    same = torch.tensor([[0.5, 0.5]])
    assert speculative.accept(same, torch.cat([same, same]), [1], [0.999, 0.2]) == (1, 0)
    assert speculative.accept(None, same, [], [0.7]) == (0, 1)


def test_draw_never_takes_the_impossible():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert draw(p, 0.0) == 1
    assert draw(p, 0.25) == 3
    assert draw(p, 1 - 2**-53) == 3
    assert {draw(p * 1e-30, u / 100) for u in range(100)} == {1, 3}


def test_filters_against_loops():
    logits = torch.randn(6, 30) * 3
    contexts = [[1, 2, 2, 29]] * 6
    for params in (
        SamplingParams(temperature=0.5), SamplingParams(top_k=5), SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.2), SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=2, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    ):  # fmt: skip
        got = probabilities(logits, params, contexts)
        for row, scores, context in zip(got, logits.tolist(), contexts, strict=True):
            penalty = params.repetition_penalty
            for token in set(context):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            masses = [math.exp(score / params.temperature) for score in scores]
            order = sorted(range(30), key=lambda token: -masses[token])
            if params.top_k:
                order = order[: params.top_k]
            total, kept, reached = sum(masses[token] for token in order), [], 0.0
            for token in order:
                if params.top_p < 1 and reached >= params.top_p * total:
                    break
                kept.append(token)
                reached += masses[token]
            kept = [token for token in kept if masses[token] >= params.min_p * masses[order[0]]]
            true = torch.zeros(30)
            true[kept] = torch.tensor([masses[token] for token in kept])
            torch.testing.assert_close(row, true / true.sum())


def test_seeds_repeat_and_differ():
    model = make_model(10)

    def tokens(seed):
        return Generator(model).generate([1], SamplingParams(max_tokens=20, seed=seed)).tokens

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_end_tokens_stop_in_the_middle_of_a_draft():
    model = make_model(11)
    params = SamplingParams(max_tokens=60, temperature=0)
    free = Generator(model).generate([5], params).tokens
    end = free[17]
    cut = free[: free.index(end) + 1]
    for draft in (None, model):
        result = Generator(model, draft, 4, stop_ids=[end]).generate([5], params)
        assert result.tokens == cut
        assert result.finish_reason == "stop"
    assert Generator(model).generate([5], params).finish_reason == "length"


def test_stats_add_up():
    model, draft = make_model(12), make_model(13)
    stats = Generator(model, draft, 4).generate([1, 2], SamplingParams(max_tokens=40, seed=1)).stats
    assert stats.tokens == 40
    assert stats.proposed == sum(stats.proposed_at)
    assert stats.accepted == sum(stats.accepted_at)
    assert stats.tokens - 1 == stats.accepted + stats.steps
    assert stats.tokens_per_step == pytest.approx(39 / stats.steps)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([97], {}, "token ids outside 0 to 96"),
        ([1] * 2000, {"max_tokens": 100}, r"2000 tokens of prompt and max_tokens = 100 make 2100, more than .* 2048"),
    ],
)
def test_bad_prompts_are_refused(prompt, params, message):
    with pytest.raises(ConfigError, match=message):
        Generator(make_model(0)).generate(prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.5),
     ("min_p", -0.1), ("repetition_penalty", 0), ("temperature", float("inf")), ("seed", -1)],
)  # fmt: skip
def test_bad_sampling_parameters_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        SamplingParams(**{name: value})


def test_a_draft_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size = 50 is not the model's 97"):
        Generator(make_model(0), make_model(0, vocab_size=50))
    with pytest.raises(ConfigError, match="draft_tokens = 0"):
        Generator(make_model(0), make_model(0), 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["héllo wörld 🙂 end of the story. The end."] * 5, 300)


@pytest.mark.parametrize(
    "text", ["plain", "héllo 🙂 wörld", "The end. STOP here", "STO ST STOP", "aSTOaSTOPb", "🙂STOP"]
)
@pytest.mark.parametrize("stop", [(), ("STOP",), ("here", "STOP", "")])
def test_streamed_text_is_the_whole_text_up_to_the_stop(tokenizer, text, stop):
    ends = [text.find(each) for each in stop if each and each in text]
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
        assert stream.stopped == bool(ends)
