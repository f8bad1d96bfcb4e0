"""/v1/chat/completions field by field, by OpenAI's own client, and the templates that make a chat one text."""

import json

import pytest
from api_server import DETAILS, assert_same, serve
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from serving import NAME, live

from moe_lm.config import ConfigError
from moe_lm.data.tokenizer import save_tokenizer
from moe_lm.server.prompts import PLAIN_STOPS, ChatTemplate
from moe_lm.server.schemas import ChatRequest

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDED = {"max_tokens": 16, "seed": 3}
TURNS = [
    {"role": "system", "content": "be brief "},
    {"role": "user", "content": "naïve?", "name": "ann"},
    {"role": "assistant", "content": "no"},
    {"role": "developer", "content": [{"type": "text", "text": "so"}, {"type": "text", "text": "!"}]},
    {"role": "user", "content": "why"},
]
PLAIN = "System: be brief\n\nUser: naïve?\n\nAssistant: no\n\nDeveloper: so!\n\nUser: why\n\nAssistant:"
HELLO = "User: hello\n\nAssistant:"


@pytest.fixture(scope="module")
def api(tokenizer, tmp_path_factory, one_thread):
    with serve(tokenizer, tmp_path_factory.mktemp("model")) as api:
        yield api


def test_a_chat_is_answered_as_its_text_is_continued(api):
    [expected] = api.expected(PLAIN, **SEEDED, **DETAILS, stop=PLAIN_STOPS)
    answer = api.chat(TURNS, **SEEDED, token_details=True)
    [choice] = answer.choices
    assert_same(choice, expected)
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", NAME, "chatcmpl-")
    usage, read = answer.usage, len(api.tokenizer.encode(PLAIN).ids)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (read, 16, read + 16)


def test_several_answers_to_a_chat(api):
    answer = api.chat("hello", n=3, **SEEDED, token_details=True)
    for choice, output in zip(answer.choices, api.expected(HELLO, n=3, **SEEDED, **DETAILS), strict=True):
        assert choice.index == output.index
        assert_same(choice, output)


@pytest.mark.parametrize("top", [None, 0, 1, 20])
def test_logprobs(api, top):
    [expected] = api.expected(HELLO, **SEEDED, logprobs=top or 0)
    [choice] = api.chat("hello", **SEEDED, logprobs=True, top_logprobs=top).choices
    texts = api.live.service.texts

    def entry(token, value):
        return {"token": texts.named(token), "logprob": value, "bytes": list(texts.of(token))}

    assert choice.logprobs.to_dict() == {"refusal": None, "content": [
        entry(each.token, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
        for each in expected.logprobs
    ]}  # fmt: skip
    assert all(len(each.top_logprobs) == (top or 0) for each in choice.logprobs.content)


def test_the_answer_may_fill_the_context(api):
    answer = api.chat("hello", seed=1, logit_bias={"0": -100}, speculation="none")
    assert answer.usage.total_tokens == api.alone.context == 512
    assert answer.choices[0].finish_reason == "length"
    for name in ("max_tokens", "max_completion_tokens"):
        found = api.chat("hello", seed=1, logit_bias={"0": -100}, **{name: 5})
        assert found.usage.completion_tokens == 5
        assert answer.choices[0].message.content.startswith(found.choices[0].message.content)


def test_options_of_completions_are_those_of_chats(api):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5, "top_k": 50, "min_p": 0.01,
        "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [250], "speculation": "ngram",
        "draft_tokens": 2, "stop": ["\n"],
    }  # fmt: skip
    given = fields | {"stop": (*fields["stop"], *PLAIN_STOPS), "logit_bias": {70: 1.5}}
    [expected] = api.expected(HELLO, **SEEDED, **given, **DETAILS, prompt_logprobs=1)
    asked = fields | {"logit_bias": {"70": 1.5}, "prompt_logprobs": 1, "user": "ann", "token_details": True}
    [choice] = api.chat("hello", **SEEDED, **asked).choices
    assert_same(choice, expected)
    assert len(choice.prompt_logprobs) == len(api.tokenizer.encode(HELLO).ids)


def test_a_schema_shapes_an_answer_and_the_client_parses_it(api):
    from pydantic import BaseModel

    class Thing(BaseModel):
        done: bool
        sizes: tuple[int, ...]

    found = api.client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "hello"}], seed=2, response_format=Thing,
        logit_bias={"61": 3},
    )  # fmt: skip
    made = found.choices[0].message.parsed
    assert isinstance(made, Thing)
    assert made == Thing.model_validate_json(found.choices[0].message.content)


def test_the_plain_way_of_a_chat_ends_before_the_next_turn(api, monkeypatch):
    template = api.live.service.template
    assert (template.is_plain, template.stops) == (True, ("\nUser:", "\nSystem:", "\nDeveloper:"))
    whole = api.chat("hello", **SEEDED).choices[0].message.content
    monkeypatch.setattr(template, "stops", (whole[5:7],))
    [choice] = api.chat("hello", **SEEDED).choices
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(whole[5:7])], "stop")


def test_every_parameter_of_the_reference_is_implemented_or_refused_by_name():
    told = CompletionCreateParamsStreaming.__annotations__.keys()
    assert told <= ChatRequest.model_fields.keys() | set(ChatRequest.NOT_IMPLEMENTED)
    assert not ChatRequest.model_fields.keys() & set(ChatRequest.NOT_IMPLEMENTED)


CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message['role'] == 'developer' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + (' ' + message.name if message.name is defined else '') }}\n"
    "{{ message['content'] | trim + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "<|im_start|>assistant\n"
    "{% endif %}"
)
JSON = "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, ensure_ascii=True) }}{% if tools %}tools{% endif %}"
OTHER = {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"}


def model_directory(tokenizer, directory, chat_template=None, file=None, **settings):
    """A directory whose tokenizer_config.json has these, and whose chat_template.jinja is `file`."""
    save_tokenizer(tokenizer, directory, 512)
    config = directory / "tokenizer_config.json"
    settings |= {"chat_template": chat_template} if chat_template else {}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if file:
        (directory / "chat_template.jinja").write_text(file, "utf-8")
    return directory


SPECIAL = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
           "special": True, "__type": "AddedToken"}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": CHATML},
        {"chat_template": CHATML, "bos_token": SPECIAL},
        {"chat_template": [OTHER, {"name": "default", "template": JSON}]},
        {"chat_template": JSON, "file": CHATML},
        {"file": JSON},
    ],
    ids=["text", "special tokens as objects", "several", "file before settings", "file"],
)
def test_a_model_s_own_template_is_rendered_as_transformers_renders_it(tokenizer, tmp_path, offline, settings):
    from transformers import AutoTokenizer

    directory = model_directory(tokenizer, tmp_path, **settings)
    theirs = AutoTokenizer.from_pretrained(directory)
    turns = [turn | ({"content": "so!"} if turn["role"] == "developer" else {}) for turn in TURNS]
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    with serve(tokenizer, directory) as api:
        status, found = api.live.json("/tokenize", {"messages": TURNS})
        assert (status, found["tokens"]) == (200, tokenizer.encode(expected, add_special_tokens=False).ids)
        [output] = api.expected(found["tokens"], **SEEDED, **DETAILS)
        assert_same(api.chat(TURNS, **SEEDED, token_details=True).choices[0], output)
        assert api.live.service.template.stops == ()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ strftime_now.__globals__.json }}", "unsafe"),
        ("{{ '{0.__class__.__name__}'.format(messages) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "range"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ messages | sum }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_refuses_or_wants_out_of_the_sandbox_is_the_request_s_error(
    tokenizer, engine, tmp_path, template, reason
):
    with live(engine, model_directory(tokenizer, tmp_path, template)) as server:
        status, found = server.json("/v1/chat/completions", {"model": NAME, "messages": TURNS})
        assert (status, found["error"]["param"]) == (400, "messages")
        assert reason in found["error"]["message"]
        assert found["error"]["message"].startswith("the model's chat template refuses these messages: ")
        assert server.complete(prompt="x", max_tokens=1)


@pytest.fixture(scope="module")
def engine(tokenizer, one_thread):
    from serving import toy_engine

    return toy_engine(tokenizer)


def test_what_is_no_template_is_an_error_at_the_start(tokenizer, tmp_path):
    for number, bad in enumerate(("{% if %}", "{{ x", "{% nothing %}")):
        with pytest.raises(ConfigError, match="no Jinja template"):
            ChatTemplate(model_directory(tokenizer, tmp_path / str(number), bad))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        ChatTemplate(tmp_path)
