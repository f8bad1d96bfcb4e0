"""What a request's own code does wrong, its mask or the decoding of its text, ends that request and no other."""

import pytest
import torch
from engines import VOCABULARY, drain, make_model, near_copy, no_leak, same, solo

from moe_lm.config import ConfigError
from moe_lm.engine import Engine, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_tokens": 12, "temperature": 0}


class Script:
    """A mask of the tokens 10, 11, 12, ... that fails at one call of one of its methods, or is none at all."""

    def __init__(self, method: str = "", call: int = 0, length: int = 20):
        self.method, self.left, self.length, self.came = method, call, length, 0

    def fail(self, method: str) -> None:
        self.left -= method == self.method
        if method == self.method and self.left < 0:
            raise RuntimeError("out of paper")

    def allowed(self) -> torch.Tensor:
        self.fail("allowed")
        if self.method == "shape" and self.came > 2:
            return torch.ones(VOCABULARY + 1, dtype=torch.bool)
        if self.method == "type" and self.came > 2:
            return [True] * VOCABULARY
        return torch.arange(VOCABULARY) == (10 + self.came if self.came < self.length else -1)

    def advance(self, token: int) -> None:
        self.fail("advance")
        self.came += 1

    def rollback(self, count: int) -> None:
        self.fail("rollback")
        self.came -= count


@pytest.mark.parametrize("kind", ["none", "ngram", "draft", "staged"])
@pytest.mark.parametrize(
    ("method", "call", "message"),
    [
        ("allowed", 0, "the mask's allowed failed: RuntimeError: out of paper."),
        ("allowed", 9, "the mask's allowed failed: RuntimeError: out of paper."),
        ("advance", 0, "the mask's advance failed: RuntimeError: out of paper."),
        ("advance", 7, "the mask's advance failed: RuntimeError: out of paper."),
        ("rollback", 0, "the mask's rollback failed: RuntimeError: out of paper."),
        ("shape", 0, "the mask's allowed failed: TypeError: it gave 98 entries for a vocabulary of 97."),
        ("type", 0, "the mask's allowed failed: TypeError: it gave [True, "),
    ],
)
def test_a_mask_that_fails_ends_its_request_alone(kind, method, call, message):
    model = make_model(5)
    engine = Engine(model, draft=near_copy(model), speculation=kind, adaptive=False, deterministic=True)
    prompts = [[3, 1], [*range(10, 16), 10, 11], [4] * 20]
    plain = SamplingParams(max_tokens=15, temperature=0.8, logprobs=1, n=2)
    params = SamplingParams(max_tokens=15, temperature=0.8, n=2, mask=lambda: Script(method, call))
    good, bad, other = engine.generate(prompts, [plain, params, plain])
    if method == "rollback" and kind == "none":
        assert [sample.finish_reason for sample in bad.samples] == ["length", "length"]
    else:
        assert [sample.finish_reason for sample in bad.samples] == ["error", "error"]
        assert all(sample.error.startswith(message) for sample in bad.samples)
        assert bad.tokens == [10 + place for place in range(len(bad.tokens))]
    for result, prompt in ((good, prompts[0]), (other, prompts[2])):
        assert same(result, solo(model, prompt, plain, deterministic=True))
    no_leak(engine)


@pytest.mark.parametrize("error", [ConfigError, RuntimeError])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_mask_that_cannot_be_made_ends_its_request_alone(fails, error):
    model, made = make_model(5), []

    def maker() -> Script:
        made.append(None)
        if len(made) == fails + 1:
            raise error("no such grammar")
        return Script()

    engine, params = Engine(model), SamplingParams(**GREEDY, n=3, mask=maker)
    good = engine.add([1, 2], SamplingParams(**GREEDY))
    if fails == 0 and error is ConfigError:
        with pytest.raises(ConfigError, match="no such grammar"):
            engine.add([3], params)
    else:
        bad = engine.add([3], params)
    results = drain(engine)
    assert results.pop(good)[0].tokens == solo(model, [1, 2], SamplingParams(**GREEDY))[0].tokens
    if results:
        assert {(output.finish_reason, output.error) for output in results[bad]} == {
            ("error", f"making the mask failed: {error.__name__}: no such grammar.")
        }
    else:
        assert (fails, error) == (0, ConfigError)
    no_leak(engine)


def test_a_mask_that_allows_nothing_at_first_is_an_error():
    engine = Engine(make_model(5))
    params = [SamplingParams(max_tokens=5, mask=lambda: Script(length=0)), SamplingParams(max_tokens=5)]
    bad, good = engine.generate([[1], [2]], params)
    assert (bad.tokens, bad.samples[0].error) == ([], "the mask allows no token to come next.")
    assert same(good, solo(make_model(5), [2], params[1]))


@pytest.mark.parametrize("kind", ["none", "ngram", "draft", "staged"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_text_may_be_complete_in_the_middle_of_a_draft(kind, temperature):
    model = make_model(0)
    engine = Engine(model, draft=near_copy(model), speculation=kind, adaptive=False, draft_tokens=8)
    params = SamplingParams(max_tokens=20, temperature=temperature, mask=lambda: Script(length=5))
    [output] = engine.generate([[1, 2, 10, 11, 12, 13, 14, 5, 1, 2]], params)[0].samples
    assert (output.tokens, output.finish_reason) == ([10, 11, 12, 13, 14], "stop")
    assert engine.stats.accepted or kind == "none"


def test_a_text_that_cannot_be_decoded_ends_its_request_alone(tokenizer):
    model, params = make_model(6, vocab_size=260), SamplingParams(**GREEDY)
    expected = Engine(model, tokenizer).generate(["the", "def"], params)
    engine = Engine(model, tokenizer)
    bad, good = engine.add("the", params), engine.add("def", params)
    decoder = next(sample for sequence, sample in engine.samples.items() if sequence.request_id == bad).text

    def push(tokens: list[int]) -> str:
        if tokens == expected[0].tokens[4:5]:
            raise ValueError("half a character")
        return "?"

    decoder.push = push
    results = drain(engine)
    [output] = results[bad]
    assert output.error == "decoding the text failed: ValueError: half a character."
    assert output.tokens == expected[0].tokens[: expected[0].tokens.index(expected[0].tokens[4]) + 1]
    assert same(expected[1], results[good])
    assert results[good][0].text == expected[1].text
    no_leak(engine)
