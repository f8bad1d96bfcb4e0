"""Streams: piece by piece what the answer in one piece says, wherever tokens split characters and stop strings."""

import asyncio

import openai
import pytest
from api_server import serve, turns, with_extras
from serving import NAME

from moe_lm.server.prompts import PLAIN_STOPS

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "def main("
CHAT = f"User: {PROMPT}\n\nAssistant:"
MANY_BYTES = dict.fromkeys([*range(0x60, 0xA0), *range(0xE0, 0x101)], 5.0)
"""A bias to tokens that are parts of characters."""
SEEDS = range(20)
USAGE = {"include_usage": True}


@pytest.fixture(scope="module")
def api(tokenizer, tmp_path_factory, one_thread):
    with serve(tokenizer, tmp_path_factory.mktemp("model")) as api:
        yield api


def asked(seed):
    return {"max_tokens": 20, "seed": seed, "logit_bias": {str(token): value for token, value in MANY_BYTES.items()}}


def stops_of(text, kind):
    """Stop strings that a text has: none, a character, often of several bytes, some that follow each other, several."""
    middle = len(text) // 2
    kinds = ([], [text[middle]], [text[middle : middle + 3]], [text[-1], text[middle + 1 : middle + 3], "\x00\x00"])
    return kinds[kind % 4]


async def gather(url, kind, requests):
    """Every request's answer and the chunks of its stream, all asked for at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
        create = client.completions.create if kind == "completion" else client.chat.completions.create

        async def chunks(fields):
            stream = await create(**with_extras(create, fields | {"stream": True, "stream_options": USAGE}))
            return [chunk async for chunk in stream]

        both = [call for fields in requests for call in (create(**with_extras(create, fields)), chunks(fields))]
        found = await asyncio.gather(*both)
        return list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_says_what_the_answer_says_for_all_seeds_and_stops(api, kind):
    is_chat = kind == "chat"
    own = PLAIN_STOPS if is_chat else ()
    requests, expected = [], []
    for seed in SEEDS:
        params = {"max_tokens": 20, "seed": seed, "logit_bias": MANY_BYTES, "stop": own}
        [free] = api.expected(CHAT if is_chat else PROMPT, **params)
        stop = stops_of(free.text, seed)
        cut = min((place for each in stop if (place := free.text.find(each)) >= 0), default=len(free.text))
        expected.append((free.text[:cut], "stop" if stop else free.finish_reason))
        prompt = {"messages": turns(PROMPT)} if is_chat else {"prompt": PROMPT}
        requests.append(asked(seed) | prompt | {"stop": stop[0] if len(stop) == 1 else stop})
    answers = asyncio.run(gather(api.live.url, kind, requests))
    for (answer, chunks), (text, reason) in zip(answers, expected, strict=True):
        if is_chat:
            assert answer.choices[0].message.content == text
            deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
            assert (deltas[0].role, deltas[0].content) == ("assistant", "")
            assert all(delta.role is None for delta in deltas[1:])
            pieces = [delta.content or "" for delta in deltas]
        else:
            assert answer.choices[0].text == text
            pieces = [chunk.choices[0].text for chunk in chunks[:-1]]
        assert "".join(pieces) == text
        assert answer.choices[0].finish_reason == reason
        reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + [reason]
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert any(len(char.encode()) > 2 and char != "\ufffd" for text, _ in expected for char in text)


def test_chunks_have_the_types_of_the_reference(api):
    chunks = api.chat_chunks(PROMPT, **asked(1), logprobs=True, top_logprobs=2, stream_options=USAGE)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.id.startswith("chatcmpl-") and chunk.model == NAME for chunk in chunks)
    chunks = api.completion_chunks(prompt=PROMPT, **asked(1), logprobs=2, stream_options=USAGE)
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.system_fingerprint for chunk in chunks}) == 1


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": None}, {}])
def test_usage_comes_only_where_it_is_asked_for(api, options):
    for path, body in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": turns(PROMPT)})):
        events = api.live.events(path, body | {"max_tokens": 3, "stream_options": options})
        assert not any("usage" in event for event in events)
        assert all(event["choices"] for event in events)
        with_usage = api.live.events(path, body | {"max_tokens": 3, "stream_options": USAGE})
        assert [event["usage"] for event in with_usage[:-1]] == [None] * (len(with_usage) - 1)
        usage = with_usage[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def joined(events):
    """The choices of the answer in one piece that the events of a stream make."""
    choices = {}
    for event in events:
        for piece in event["choices"]:
            own = choices.setdefault(piece["index"], {})
            if "delta" in piece:
                message = {"role": None, "content": "", "refusal": None} | own.get("message", {})
                delta = piece.pop("delta")
                message["role"] = delta.get("role", message["role"])
                piece["message"] = message | {"content": message["content"] + delta.get("content", "")}
            for name, value in piece.items():
                own[name] = added(own.get(name), value) if name in ("text", "logprobs", "token_details") else value
    return [choices[index] for index in sorted(choices)]


def added(known, new):
    """Texts and lists one after the other, objects field by field."""
    if known is None or new is None:
        return known if new is None else new
    return {name: added(known[name], new[name]) for name in known} if isinstance(known, dict) else known + new


COMPLETION_OPTIONS = [
    {"n": 3, "token_details": True},
    {"logprobs": 3},
    {"echo": True},
    {"echo": True, "logprobs": 2, "n": 2},
    {"echo": True, "logprobs": 0, "prompt": [PROMPT, "naïve 😀"]},
    {"prompt_logprobs": 2, "token_details": True, "logprobs": 1},
]
CHAT_OPTIONS = [{"n": 3, "token_details": True}, {"logprobs": True, "top_logprobs": 3}, {"prompt_logprobs": 1}]


@pytest.mark.parametrize("options", COMPLETION_OPTIONS, ids=lambda options: " ".join(options))
def test_the_pieces_of_a_completion_make_the_answer(api, options):
    fields = {"prompt": PROMPT} | asked(2) | options
    whole = api.live.complete(**fields)
    events = api.live.events("/v1/completions", fields)
    assert joined(events) == whole["choices"]


@pytest.mark.parametrize("options", CHAT_OPTIONS, ids=lambda options: " ".join(options))
def test_the_pieces_of_a_chat_make_the_answer(api, options):
    fields = {"messages": turns(PROMPT), "model": NAME} | asked(2) | options
    status, whole = api.live.json("/v1/chat/completions", fields)
    assert status == 200
    events = api.live.events("/v1/chat/completions", fields)
    for index in range(len(whole["choices"])):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["finish_reason"]
        assert all(choice["finish_reason"] is None for choice in own[:-1])
    assert joined(events) == whole["choices"]
