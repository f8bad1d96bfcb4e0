"""/v1/completions field by field, by OpenAI's own client: what the engine gives directly is what the server answers."""

import codecs
import json

import pytest
from api_server import DETAILS, assert_same, serve
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from serving import NAME

from moe_lm.engine import grammar
from moe_lm.server.schemas import CompletionRequest

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "def main("
SEEDED = {"max_tokens": 16, "seed": 3}
SCHEMA = {
    "type": "object", "required": ["size", "kind"], "additionalProperties": False,
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
}  # fmt: skip
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}

OPTIONS = {
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "seed": {"seed": 11},
    "largest seed": {"seed": 2**63 - 1},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.2},
    "min_p": {"min_p": 0.5},
    "presence_penalty": {"presence_penalty": 2.0, "temperature": 0.2},
    "frequency_penalty": {"frequency_penalty": -2.0, "temperature": 0.2},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "logit_bias": {"logit_bias": {65: 4.0, 66: 5.0, 0: -100.0}},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {0: 4.0}},
    "stop_token_ids": {"stop_token_ids": [*range(40, 130)]},
    "stop": {"stop": [" ", "e", "\n"], "logit_bias": {221: 6.0, 70: 6.0}},
    "max_tokens": {"max_tokens": 3},
}
"""Fields that the engine knows by the same name, with values that change what SEEDED gives."""
FORMS = [JSON_SCHEMA, {"type": "json_object"}, {"type": "text"}]
MANY_BYTES = dict.fromkeys([*range(0x60, 0xA0), *range(0xE0, 0x101)], 5.0)
"""A bias to tokens that are parts of characters."""


@pytest.fixture(scope="module")
def api(tokenizer, tmp_path_factory, one_thread):
    with serve(tokenizer, tmp_path_factory.mktemp("model")) as api:
        yield api


def plain(fields):
    """JSON has no integer keys."""
    bias = fields.get("logit_bias")
    return fields | ({"logit_bias": {str(token): value for token, value in bias.items()}} if bias else {})


@pytest.fixture(scope="module")
def together(api):
    """The answers to all of OPTIONS, each four times in other forms of speculation, served at once."""
    kinds = [("none", 1), ("ngram", 3), ("draft", 2), ("staged", 16)]
    asked = [(name, kind) for name in OPTIONS for kind in kinds]
    answers = api.completions([
        SEEDED | {"prompt": PROMPT, "token_details": True, "speculation": kind, "draft_tokens": most}
        | plain(OPTIONS[name]) for name, (kind, most) in asked
    ])  # fmt: skip
    return {name: [answers[i] for i, (own, _) in enumerate(asked) if own == name] for name in OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_in_company_what_the_engine_gives_alone(api, together, name):
    [expected] = api.expected(PROMPT, **SEEDED | OPTIONS[name], **DETAILS)
    [without] = api.expected(PROMPT, **SEEDED)
    assert expected.tokens != without.tokens
    for answer in together[name]:
        [choice] = answer.choices
        assert_same(choice, expected)
        assert answer.usage.completion_tokens == len(expected.tokens)


def test_how_tokens_were_guessed_is_told(api, together):
    by_kind = [{each["source"] for answer in answers for each in answer.choices[0].token_details}
               for answers in zip(*together.values(), strict=True)]  # fmt: skip
    assert by_kind[0] == {"target"}
    assert by_kind[1] == {"target", "ngram"}
    assert by_kind[2] == {"target", "draft"}
    assert {"target", "draft"} <= by_kind[3] <= {"target", "draft", "ngram"}


def test_token_details_of_every_token(api):
    [expected] = api.expected(PROMPT, **SEEDED, **DETAILS)
    [choice] = api.completion(prompt=PROMPT, **SEEDED, token_details=True).choices
    assert choice.logprobs is None
    config = api.alone.target.model.config
    for detail in choice.token_details:
        assert sorted(detail) == ["bytes", "experts", "id", "logprob", "source", "text", "top"]
        assert bytes(detail["bytes"]).decode(errors="replace") == detail["text"]
        assert len(detail["experts"]) == config.num_hidden_layers
        for experts in detail["experts"]:
            assert len(set(experts)) == config.num_experts_per_tok
            assert set(experts) <= set(range(config.num_local_experts))
        assert len(detail["top"]) == 5
        assert all(sorted(top) == ["id", "logprob", "text"] for top in detail["top"])
    assert spelled(bytes(detail["bytes"]) for detail in choice.token_details).rstrip("\ufffd") == expected.text


def test_prompts_in_every_form(api):
    texts = [PROMPT, "the quick", "x"]
    ids = [api.tokenizer.encode(text).ids for text in texts]
    greedy = {"max_tokens": 5, "temperature": 0}
    expected = [api.expected(text, **greedy)[0].text for text in texts]
    for prompt in (texts, ids):
        answer = api.completion(prompt=prompt, **greedy)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 15
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 15
    for prompt in (texts[0], ids[0]):
        [choice] = api.completion(prompt=prompt, **greedy).choices
        assert choice.text == expected[0]
    start = api.tokenizer.token_to_id("<|endoftext|>")
    for prompt in (None, "", [start]):
        answer = api.completion(prompt=prompt, **greedy)
        assert answer.choices[0].text == api.expected([start], **greedy)[0].text
        assert answer.usage.prompt_tokens == 1
    status, answer = api.live.json("/v1/completions", {"model": NAME, **greedy})
    assert status == 200
    assert answer["choices"][0]["text"] == api.expected([start], **greedy)[0].text


def test_several_samples_of_several_prompts(api):
    answer = api.completion(prompt=[PROMPT, "the"], n=3, **SEEDED, token_details=True)
    outputs = [each for prompt in (PROMPT, "the") for each in api.expected(prompt, n=3, **SEEDED, **DETAILS)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({output.text for output in outputs}) == 6
    for choice, output in zip(answer.choices, outputs, strict=True):
        assert_same(choice, output)


def test_a_request_without_seed_is_another_each_time_and_with_one_the_same(api):
    asked = {"prompt": PROMPT, "max_tokens": 12}
    answers = api.completions([asked] * 3 + [asked | {"seed": -5}] * 3 + [asked | {"seed": 2**63 - 5}])
    texts = [answer.choices[0].text for answer in answers]
    assert len(set(texts[:3])) == 3
    assert len(set(texts[3:])) == 1
    assert len({answer.id for answer in answers}) == len(answers)
    assert len({answer.system_fingerprint for answer in answers}) == 1


def test_answers_name_what_they_are(api):
    answer = api.completion(prompt=PROMPT, max_tokens=1, user="someone", temperature=None, n=None, stop=None)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", NAME)
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.created >= api.live.service.created
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert len(api.completion(prompt=PROMPT, ignore_eos=True).choices[0].text) > 0
    assert api.completion(prompt=PROMPT, ignore_eos=True).usage.completion_tokens == 16, "the default of max_tokens"


def test_a_prompt_that_is_cached_is_told(api):
    prompt = api.tokenizer.encode("the quick brown fox, 12345 times, and then" * 2).ids
    found = [api.completion(prompt=prompt, max_tokens=4, seed=1) for _ in range(2)]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in found]
    block = api.live.engine.scheduler.pool.block_size
    assert cached == [0, (len(prompt) - 1) // block * block]
    assert found[0].choices[0].text == found[1].choices[0].text


def assert_offsets(offsets, text, pieces):
    """Each token begins behind the whole characters of those before it, of which `pieces` are the bytes. What is no
    character at the end of a text is not shown."""
    for i, place in enumerate(offsets):
        before = spelled(pieces[:i])
        assert place == len(before)
        assert before == text[:place] + "\ufffd" * (place - len(text))


def spelled(pieces):
    return codecs.utf_8_decode(b"".join(pieces), "replace", False)[0]


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs(api, top, ignore_eos):
    asked = {"max_tokens": 24, "seed": 5, "ignore_eos": ignore_eos, "logit_bias": {0: 7.0}}
    [expected] = api.expected(PROMPT, **asked, logprobs=top)
    assert (0 in expected.tokens[:-1]) == ignore_eos
    [choice] = api.completion(prompt=PROMPT, logprobs=top, **plain(asked)).choices
    texts, found = api.live.service.texts, choice.logprobs
    assert choice.text == expected.text
    assert found.tokens == [texts.named(token) for token in expected.tokens]
    assert found.token_logprobs == [each.logprob for each in expected.logprobs]
    for named, each in zip(found.top_logprobs, expected.logprobs, strict=True):
        assert named == {texts.named(token): value for token, value in [*each.top, (each.token, each.logprob)]}
        assert top <= len(named) <= top + 1
    # An end of text that does not end it is not in it.
    assert_offsets(found.text_offset, choice.text, [texts.of(token) if token else b"" for token in expected.tokens])


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("prompt", [PROMPT, "naïve – !<|endoftext|>😀"])
def test_echo(api, prompt, cut):
    """Also of a prompt that ends within a character."""
    ids = api.tokenizer.encode(prompt).ids
    ids = ids[: len(ids) - cut]
    prompt = api.tokenizer.decode(ids, skip_special_tokens=False)
    [expected] = api.expected(ids, **SEEDED, logprobs=2, prompt_logprobs=2)
    for given in [ids] if "\ufffd" in prompt else [ids, prompt]:
        assert api.completion(prompt=given, echo=True, **SEEDED).choices[0].text == prompt + expected.text
        status, answer = api.live.json(
            "/v1/completions", {"model": NAME, "prompt": given, "echo": True, "logprobs": 2, **SEEDED}
        )
        assert status == 200
        [choice] = answer["choices"]
        assert choice["text"] == prompt + expected.text
        texts, found, tokens = api.live.service.texts, choice["logprobs"], ids + expected.tokens
        assert found["tokens"] == [texts.named(token) for token in tokens]
        known = [*expected.prompt_logprobs, *expected.logprobs]
        assert found["token_logprobs"] == [each and each.logprob for each in known]
        assert found["top_logprobs"][0] is None
        assert found["top_logprobs"][1:] == [
            {texts.named(token): value for token, value in [*each.top, (each.token, each.logprob)]}
            for each in known[1:]
        ]  # fmt: skip
        offsets, places = found["text_offset"], [place - len(prompt) for place in found["text_offset"][len(ids) :]]
        assert_offsets(offsets[: len(ids)], choice["text"], [texts.of(token) for token in ids])
        assert_offsets(places, expected.text, [texts.of(token) for token in expected.tokens])


def test_a_prompt_alone_is_scored(api):
    ids = api.tokenizer.encode(PROMPT).ids
    [expected] = api.expected(PROMPT, max_tokens=0, prompt_logprobs=1)
    for stream in (False, True):
        asked = {"prompt": [PROMPT] * 2, "max_tokens": 0, "echo": True, "logprobs": 1}
        if stream:
            events = api.live.events("/v1/completions", asked)
            choices = [event["choices"][0] for event in events]
        else:
            answer = api.live.complete(**asked)
            choices = answer["choices"]
            assert answer["usage"]["completion_tokens"] == 0
        assert sorted(choice["index"] for choice in choices) == [0, 1]
        for choice in choices:
            assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
            known = [each and each.logprob for each in expected.prompt_logprobs]
            assert choice["logprobs"]["token_logprobs"] == known
            assert len(choice["logprobs"]["tokens"]) == len(ids)
    [choice] = api.completion(prompt=PROMPT, max_tokens=0).choices
    assert (choice.text, choice.finish_reason) == ("", "length")


def test_prompt_logprobs(api):
    [expected] = api.expected(PROMPT, max_tokens=2, seed=0, prompt_logprobs=3)
    texts = api.live.service.texts
    for n in (1, 2):
        answer = api.completion(prompt=PROMPT, max_tokens=2, seed=0, prompt_logprobs=3, n=n)
        for choice in answer.choices:
            assert choice.prompt_logprobs == [each and {
                str(token): {"logprob": value, "decoded_token": texts.shown(token)}
                for token, value in [(each.token, each.logprob), *each.top]
            } for each in expected.prompt_logprobs]  # fmt: skip


def test_a_token_is_banned_and_another_forced(api):
    [token] = api.tokenizer.encode("z").ids
    forced = api.completion(prompt=PROMPT, max_tokens=9, logit_bias={str(token): 100})
    assert forced.choices[0].text == "z" * 9
    asked = [{"prompt": PROMPT, "max_tokens": 40, "seed": seed, "speculation": "none"} for seed in range(16)]
    assert "stop" in {answer.choices[0].finish_reason for answer in api.completions(asked)}
    answers = api.completions([each | {"logit_bias": {"0": -100}, "token_details": True} for each in asked])
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert not any(each["id"] == 0 for answer in answers for each in answer.choices[0].token_details)


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings(api, seed):
    """Where the text that comes without them has them, also in the middle of tokens and over several."""
    params = {"max_tokens": 32, "seed": seed, "logit_bias": MANY_BYTES}
    asked = {"prompt": PROMPT} | plain(params)
    [free] = api.expected(PROMPT, **params)
    assert any(len(char.encode()) > 1 and char != "\ufffd" for char in free.text)
    middle = len(free.text) // 2
    several = [free.text[-1], free.text[middle], "\x00\x00"]
    for stop in (free.text[middle], free.text[middle : middle + 2], several):
        given = [stop] if isinstance(stop, str) else stop
        [choice] = api.completion(**asked, stop=stop, logprobs=0).choices
        [expected] = api.expected(PROMPT, **params, stop=tuple(given))
        assert (choice.text, choice.finish_reason) == (expected.text, "stop")
        assert choice.text == free.text[: min(place for each in given if (place := free.text.find(each)) >= 0)]
        pieces = api.completion_chunks(**asked, stop=stop, stream_options={"include_usage": True})
        assert "".join(each.choices[0].text for each in pieces[:-1]) == choice.text
        assert pieces[-1].usage.completion_tokens == len(expected.tokens) == len(choice.logprobs.tokens)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["type"])
def test_response_format(api, form):
    schema = {"json_schema": SCHEMA, "json_object": {"type": "object"}}.get(form["type"])
    params = {"max_tokens": 60, "seed": 4}
    mask = schema and grammar.json_schema(schema, api.tokenizer, (0,))
    [expected] = api.expected(PROMPT, **params, mask=mask, **DETAILS)
    for speculation in ("none", "draft"):
        asked = params | {"prompt": PROMPT, "response_format": form, "speculation": speculation}
        [choice] = api.completion(**asked, token_details=True).choices
        assert_same(choice, expected)
    if form["type"] == "json_schema":
        made = json.loads(expected.text)
        assert expected.finish_reason == "stop"
        assert isinstance(made["size"], int)
        assert 0 <= made["size"] <= 99
        assert made["kind"] in ("a", "b")
        assert made.keys() == SCHEMA["properties"].keys()
    elif form["type"] == "json_object":
        assert expected.text.startswith("{")


def test_every_parameter_of_the_reference_is_implemented_or_refused_by_name():
    told = CompletionCreateParamsStreaming.__annotations__.keys()
    assert told <= CompletionRequest.model_fields.keys() | set(CompletionRequest.NOT_IMPLEMENTED)
    assert not CompletionRequest.model_fields.keys() & set(CompletionRequest.NOT_IMPLEMENTED)
