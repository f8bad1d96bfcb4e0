"""A server with OpenAI's client before it, and an engine like its own beside it that is asked directly."""

import asyncio
import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import NAME, Live, live, toy_engine

from moe_lm.engine import Engine, Output, SamplingParams

DETAILS = {"logprobs": 5, "experts": True}
"""What the engine must be asked for to know what token_details says."""


class ChunkChoice(CompletionChoice):
    """As OpenAI's reference has it in a stream, where its client's types forget the null."""

    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class CompletionChunk(Completion):
    choices: list[ChunkChoice]


class Api:
    """`alone` guesses nothing ahead and caches nothing: a server must answer in company what it answers alone."""

    def __init__(self, live: Live, alone: Engine):
        self.live, self.alone = live, alone
        self.client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0, timeout=60)
        self.tokenizer = alone.tokenizer

    def expected(self, prompt: str | list[int], **params: Any) -> list[Output]:
        """What the engine gives, each sample whole."""
        return self.alone.generate([prompt], SamplingParams(**params))[0].samples

    def completion(self, **fields: Any) -> Completion:
        """An answer of /v1/completions, every field of the type that the client declares."""
        create = self.client.completions.with_raw_response.create
        raw = create(**with_extras(self.client.completions.create, fields))
        return Completion.model_validate(json.loads(raw.text), strict=True)

    def chat(self, messages: str | list[dict[str, Any]], **fields: Any) -> ChatCompletion:
        """An answer of /v1/chat/completions, as strictly; a text is one message of the user."""
        create = self.client.chat.completions.with_raw_response.create
        raw = create(**with_extras(self.client.chat.completions.create, {"messages": turns(messages)} | fields))
        return ChatCompletion.model_validate(json.loads(raw.text), strict=True)

    def completion_chunks(self, **fields: Any) -> list[CompletionChunk]:
        create = self.client.completions.create
        with create(**with_extras(create, {"stream": True} | fields)) as stream:
            return [CompletionChunk.model_validate(each.to_dict(), strict=True) for each in stream]

    def chat_chunks(self, messages: str | list[dict[str, Any]], **fields: Any) -> list[ChatCompletionChunk]:
        create = self.client.chat.completions.create
        with create(**with_extras(create, {"stream": True, "messages": turns(messages)} | fields)) as stream:
            return [ChatCompletionChunk.model_validate(each.to_dict(), strict=True) for each in stream]

    def completions(self, requests: list[dict[str, Any]]) -> list[Completion]:
        """Answers of many requests that are served at once."""

        async def ask() -> list[Completion]:
            async with openai.AsyncOpenAI(base_url=f"{self.live.url}/v1", api_key="x", max_retries=0) as client:
                create = client.completions.create
                return await asyncio.gather(*[create(**with_extras(create, fields)) for fields in requests])

        return asyncio.run(ask())

    def refusal(self, path: str, **fields: Any) -> dict[str, Any]:
        """The error of a request that is answered by 400."""
        status, found = self.live.json(path, {"model": NAME, **fields})
        assert status == 400, found
        assert found["error"]["type"] == "invalid_request_error"
        return found["error"]


def with_extras(create: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method of the client: what it does not know by name goes into the body as it is."""
    known = inspect.signature(create).parameters
    extras = {name: value for name, value in fields.items() if name not in known}
    named = {name: value for name, value in fields.items() if name in known}
    return {"model": NAME, "extra_body": extras, **named}


def turns(messages: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def assert_same(choice: Any, output: Output) -> None:
    """A choice with token_details, of either endpoint, says what the engine gave, the numbers bit for bit."""
    text = choice.text if isinstance(choice, CompletionChoice) else choice.message.content
    assert (text, choice.finish_reason) == (output.text, output.finish_reason)
    details = choice.token_details
    assert [each["id"] for each in details] == output.tokens
    assert [each["logprob"] for each in details] == [each.logprob for each in output.logprobs]
    tops = [[(top["id"], top["logprob"]) for top in each["top"]] for each in details]
    assert tops == [each.top[:5] for each in output.logprobs]
    assert [each["experts"] for each in details] == output.experts


@contextlib.contextmanager
def serve(tokenizer, directory: Path, **options: Any) -> Iterator[Api]:
    """A server of the toy model while the block runs; at its end nothing may be left in the engine."""
    # Guesses do not depend on the clock then.
    engine = toy_engine(tokenizer, adaptive=False)
    alone = toy_engine(tokenizer, deterministic=True, speculation="none", prefix_cache=False)
    with live(engine, directory, **options) as running:
        yield Api(running, alone)
        running.assert_no_leak()
