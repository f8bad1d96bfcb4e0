"""The two endpoints that generate: from a request to jobs of the engine, and from outputs to an answer."""

import asyncio
import dataclasses
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from moe_lm.config import ConfigError
from moe_lm.engine import Output, SamplingParams
from moe_lm.server.answers import ChatChoice, Choice, CompletionChoice, Prompt, usage
from moe_lm.server.errors import ApiError
from moe_lm.server.http import send_events, while_connected
from moe_lm.server.parsing import receive as receive_request
from moe_lm.server.prompts import split_prompts
from moe_lm.server.schemas import TOKEN_DETAILS_TOP, ChatRequest, CompletionRequest, Generation
from moe_lm.server.service import Service
from moe_lm.server.worker import Call, Job

log = logging.getLogger("moe_lm.server")

DEFAULT_MAX_TOKENS = 16
"""Of a completion, as OpenAI has it."""
PASSED_ON = (
    "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty",
    "ignore_eos", "prompt_logprobs", "speculation", "draft_tokens",
)  # fmt: skip
"""Fields that the engine knows by the same name."""


class Endpoint(ABC):
    """An ASGI app that answers one kind of request; its two kinds say what differs."""

    request_type: ClassVar[type[Generation]]
    choice_type: ClassVar[type[Choice]]
    prefix: ClassVar[str]
    kinds: ClassVar[tuple[str, str]]
    """The `object` of an answer in one piece, and of a piece of a stream."""
    prompt_field: ClassVar[str]

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, arrived = self.service, time.monotonic()
        # Before the body is looked at: under overload most of the work is to refuse.
        service.worker.require_service()
        service.worker.require_room()
        request = await receive_request(self.request_type, Request(scope, receive), service.limits)
        service.check_model(request.model)
        if request.stream_options and not request.stream:
            raise ApiError("stream_options is for streams: set stream, or leave it out.", param="stream_options")
        # In a thread: to tokenize megabytes takes seconds.
        prompts = await asyncio.to_thread(self.prompts, request)
        params = await self.params(request, prompts)
        for prompt in prompts:
            service.check(prompt.tokens, params, self.prompt_field)
        answer = Answer(self, request, prompts, params)
        with service.worker.open(answer.jobs, arrived, bool(request.stream)) as call:
            work = send_events(send, answer.events(call)) if request.stream else answer.whole(call)
            try:
                found = await while_connected(receive, work)
            except ClientDisconnect:
                answer.log("client left", call)
                return
            except ApiError as error:
                answer.log(str(error), call)
                raise
            answer.log(str(found) if isinstance(found, ApiError) else "done", call)
        if not request.stream:
            await JSONResponse(found)(scope, receive, send)

    @abstractmethod
    def prompts(self, request: Generation) -> list[Prompt]:
        """Raises ApiError."""

    @abstractmethod
    def fields(self, request: Generation, prompts: list[Prompt]) -> dict[str, Any]:
        """max_tokens, logprobs, stop, and what else of SamplingParams the kinds name differently."""

    @abstractmethod
    def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice of an answer in one piece, from what Choice.read gives."""

    @abstractmethod
    def pieces(self, choice: dict[str, Any], first: bool) -> list[dict[str, Any]]:
        """The same of a stream: one or several."""

    async def params(self, request: Generation, prompts: list[Prompt]) -> SamplingParams:
        """How to sample. Raises ApiError."""
        mask = await self.service.mask(request.response_format)
        fields = {name: value for name in PASSED_ON if (value := getattr(request, name)) is not None}
        fields |= self.fields(request, prompts)
        if request.token_details:
            fields |= {"logprobs": max(fields["logprobs"] or 0, TOKEN_DETAILS_TOP), "experts": True}
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        try:
            return SamplingParams(
                **fields, mask=mask, logit_bias=bias, stop=(*stop, *self.own_stops()),
                stop_token_ids=request.stop_token_ids or (), reproducible=request.seed is not None,
            )  # fmt: skip
        except ConfigError as error:
            raise ApiError(str(error), param=str(error).partition(" ")[0], code="invalid_value") from None

    def own_stops(self) -> tuple[str, ...]:
        """Texts that end every answer of this kind."""
        return ()


class Completions(Endpoint):
    """/v1/completions"""

    request_type, choice_type, prefix = CompletionRequest, CompletionChoice, "cmpl"
    kinds, prompt_field = ("text_completion", "text_completion"), "prompt"

    def prompts(self, request: CompletionRequest) -> list[Prompt]:
        service, most = self.service, self.service.limits.max_waiting
        asked = split_prompts(request.prompt)
        if len(asked) > most:
            raise ApiError(
                f"prompt holds {len(asked)} prompts, more than the {most} of max_waiting: send fewer at a time.",
                param="prompt",
            )  # fmt: skip
        found = []
        for prompt in asked:
            # Millions of ids are told from a prompt by their number alone.
            if len(prompt) > service.engine.context and not isinstance(prompt, str):
                raise ApiError(
                    f"prompt has {len(prompt)} tokens, more than the context of {service.engine.context}; shorten it.",
                    param="prompt", code="context_length_exceeded",
                )  # fmt: skip
            text = prompt if isinstance(prompt, str) else service.text(prompt, self.prompt_field)
            tokens = service.tokens(prompt) if isinstance(prompt, str) else prompt
            found.append(Prompt(request, tokens or [service.start_token()], text, service.texts))
        return found

    def fields(self, request: CompletionRequest, prompts: list[Prompt]) -> dict[str, Any]:
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        fields = {"max_tokens": max_tokens, "logprobs": request.logprobs}
        if request.echo and request.logprobs is not None:
            fields["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        return fields

    def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        return choice

    def pieces(self, choice: dict[str, Any], first: bool) -> list[dict[str, Any]]:
        return [choice]


class Chat(Endpoint):
    """/v1/chat/completions"""

    request_type, choice_type, prefix = ChatRequest, ChatChoice, "chatcmpl"
    kinds, prompt_field = ("chat.completion", "chat.completion.chunk"), "messages"

    def prompts(self, request: ChatRequest) -> list[Prompt]:
        tokens = self.service.chat_tokens(request.messages)
        return [Prompt(request, tokens or [self.service.start_token()], "", self.service.texts)]

    def fields(self, request: ChatRequest, prompts: list[Prompt]) -> dict[str, Any]:
        asked = request.max_completion_tokens
        if None not in (asked, request.max_tokens):
            raise ApiError(
                f"max_tokens = {request.max_tokens} and max_completion_tokens = {asked} are two names of one thing: "
                "give one.", param="max_tokens",
            )  # fmt: skip
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(f"top_logprobs = {request.top_logprobs} needs logprobs = true.", param="top_logprobs")
        asked = request.max_tokens if asked is None else asked
        # A prompt that fills the context is refused for the token that has no room.
        left = max(1, self.service.engine.context - len(prompts[0].tokens))
        return {
            "max_tokens": left if asked is None else asked,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        }

    def own_stops(self) -> tuple[str, ...]:
        return self.service.template.stops

    def whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.pop("content"), "refusal": None}
        return {"message": message} | choice

    def pieces(self, choice: dict[str, Any], first: bool) -> list[dict[str, Any]]:
        begin = {"index": choice["index"], "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                 "finish_reason": None}  # fmt: skip
        content = choice.pop("content")
        delta = {"delta": {"content": content} if content or choice["finish_reason"] is None else {}}
        return [begin, delta | choice] if first else [delta | choice]


class Answer:
    """One request on its way to its answer."""

    def __init__(self, endpoint: Endpoint, request: Generation, prompts: list[Prompt], params: SamplingParams):
        self.endpoint, self.request, self.prompts = endpoint, request, prompts
        self.id, self.created = f"{endpoint.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.jobs = [
            Job(self.id if len(prompts) == 1 else f"{self.id}-{place}", prompt.tokens, seeded(params, request.seed))
            for place, prompt in enumerate(prompts)
        ]
        self.places = {job.request_id: place for place, job in enumerate(self.jobs)}
        self.choices = [
            endpoint.choice_type(prompt, place * params.n + index)
            for place, prompt in enumerate(prompts)
            for index in range(params.n)
        ]
        self.finish_reasons: list[str] = []

    def choice(self, output: Output) -> Choice:
        """The choice that an output belongs to; what the output says of the prompt is taken."""
        place = self.places[output.request_id]
        self.prompts[place].read(output)
        return self.choices[place * self.jobs[place].params.n + output.index]

    async def whole(self, call: Call) -> dict[str, Any]:
        """The answer in one piece."""
        outputs: dict[int, Output] = {}
        while call.going or call.unread:
            for output in await call.next():
                index = self.choice(output).index
                if index in outputs:
                    outputs[index].extend(output)
                else:
                    outputs[index] = output
        read = [self.endpoint.whole(choice.read(outputs[choice.index])) for choice in self.choices]
        self.finish_reasons = [choice["finish_reason"] for choice in read]
        return self.around(0, read) | {"usage": usage(self.prompts, self.choices)}

    async def events(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        options = self.request.stream_options
        with_usage = bool(options and options.include_usage)
        while call.going or call.unread:
            for output in await call.next():
                choice = self.choice(output)
                first = not choice.begun
                read = choice.read(output)
                if not (first or output.text or output.finish_reason or read["logprobs"] or "token_details" in read):
                    continue  # tokens of a character or a stop string that is not whole
                if output.finish_reason:
                    self.finish_reasons.append(output.finish_reason)
                for piece in self.endpoint.pieces(read, first):
                    yield self.around(1, [piece]) | ({"usage": None} if with_usage else {})
        if with_usage:
            yield self.around(1, []) | {"usage": usage(self.prompts, self.choices)}

    def around(self, kind: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": self.endpoint.kinds[kind], "created": self.created, "model": self.request.model,
            "system_fingerprint": self.endpoint.service.fingerprint, "choices": choices,
        }  # fmt: skip

    def log(self, end: str, call: Call) -> None:
        """A line about the request, once it is over."""
        log.info(
            "%s user=%r prompts=%d prompt_tokens=%d new_tokens=%d seconds=%.3f finish=%s: %s", self.id,
            self.request.user, len(self.prompts), sum(len(prompt.tokens) for prompt in self.prompts),
            sum(choice.tokens for choice in self.choices), time.monotonic() - call.arrived,
            ",".join(self.finish_reasons), end,
        )  # fmt: skip


def seeded(params: SamplingParams, seed: int | None) -> SamplingParams:
    """The params with the seed that was asked for, else with one of their own."""
    return dataclasses.replace(params, seed=secrets.randbits(63) if seed is None else seed % 2**63)
