"""A small HTTP client for load: one completion on one connection, and what came of it, with the time of every token.

Plain sockets: a client that costs more than the server would measure itself.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

GIVE_UP = 120.0
"""Seconds after which a request without an end counts as failed."""
SMALL_BUFFER = 4096
"""Bytes that a slow reader's side of the connection holds, so that the server's side fills up."""


@dataclass(frozen=True)
class Ask:
    """One completion to be asked for, and how its client behaves."""

    prompt: list[int]
    max_tokens: int
    greedy: bool = True
    """Else drawn at temperature 1. Drawn ones may end by themselves, greedy ones go on to their full length."""
    stream: bool = True
    counted: bool = True
    """Whether tokens are told one by one, so that they can be counted; else only in the end."""
    pause: float = 0.0
    """Seconds that a slow reader waits after each event; it asks for the details of tokens, which are many bytes."""
    leave_after_seconds: float | None = None
    leave_after_tokens: int | None = None
    """When the client closes the connection, if it does not wait for the end."""

    @property
    def usual(self) -> bool:
        """Whether latencies are the server's: the client neither leaves nor reads slowly."""
        return not self.pause and self.leave_after_seconds is None and self.leave_after_tokens is None

    def body(self, model: str) -> dict[str, Any]:
        """The request's JSON."""
        body = {"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens, "stream": self.stream,
                "temperature": 0 if self.greedy else 1, "ignore_eos": self.greedy}  # fmt: skip
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.pause:
            body["token_details"] = True
        elif self.counted:
            body["logprobs"] = 0
        return body


@dataclass
class Answer:
    """What a client saw. Times are those of time.perf_counter."""

    ask: Ask
    sent: float
    ended: float = 0.0
    status: int | None = None
    """None without an answer: nobody listened, or the connection broke."""
    retry_after: str | None = None
    finish_reason: str | None = None
    done: bool = False
    """Whether the answer was whole: with [DONE] where it is a stream."""
    usage: int | None = None
    """New tokens as the server counts them."""
    tokens: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many; with the first text as one, where they are not counted."""
    left: bool = False
    """By its own decision."""
    error: str | None = None

    @property
    def outcome(self) -> str:
        """`answered`, `left`, `rejected` (the queue is full), `refused` (the server ends), `unreachable`, `failed`."""
        if self.left:
            return "left"
        if self.status is None and self.error is None:
            return "unreachable"
        named = {429: "rejected", 503: "refused"}.get(self.status)
        return named or ("answered" if self.done and self.finish_reason and self.error is None else "failed")

    @property
    def counted(self) -> int:
        return sum(count for _, count in self.tokens)


@dataclass(frozen=True)
class Server:
    """Where a server listens, and what it calls its model."""

    host: str
    port: int
    model: str = ""

    async def ask(self, ask: Ask) -> Answer:
        """One completion, to its end or to where its client leaves."""
        answer = Answer(ask, time.perf_counter())
        patience = GIVE_UP if ask.leave_after_seconds is None else ask.leave_after_seconds
        try:
            async with asyncio.timeout(patience), self.connection(ask.pause > 0) as (reader, writer):
                await self.talk(answer, reader, writer)
        except ConnectionRefusedError:
            pass
        except TimeoutError:
            answer.left = ask.leave_after_seconds is not None
            answer.error = f"no end within {patience:g} s"
        except (OSError, EOFError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended = time.perf_counter()
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET. Raises OSError where nobody answers."""
        async with asyncio.timeout(GIVE_UP), self.connection() as (reader, writer):
            writer.write(self.head("GET", path) + b"\r\n")
            status, headers = await read_head(reader)
            return status, b"".join([chunk async for chunk in read_body(reader, headers)])

    async def json(self, path: str) -> Any:
        return json.loads((await self.get(path))[1])

    @contextlib.asynccontextmanager
    async def connection(self, small: bool = False) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, gone without a farewell when the block is left."""
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if small:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=SMALL_BUFFER if small else 1 << 16)
        except BaseException:
            sock.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def head(self, method: str, path: str) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{method} {path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nConnection: close\r\n".encode()

    async def talk(self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send the request and read its answer."""
        body = json.dumps(answer.ask.body(self.model)).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        writer.write(self.head("POST", "/v1/completions") + kind + body)
        answer.status, headers = await read_head(reader)
        answer.retry_after = headers.get("retry-after")
        if headers.get("content-type", "").startswith("text/event-stream"):
            await read_events(answer, read_body(reader, headers))
            return
        found = json.loads(b"".join([chunk async for chunk in read_body(reader, headers)]))
        note(answer, found)
        answer.done = answer.status == 200


async def read_events(answer: Answer, chunks: AsyncIterator[bytes]) -> None:
    """Read a stream up to its end, or up to as many tokens as its client wants."""
    ask, rest = answer.ask, b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if answer.done or data == event:
                raise ValueError(f"{event[:60]!r} is no event before the end of the stream")
            if data == b"[DONE]":
                answer.done = True
                continue
            note(answer, json.loads(data))
            if ask.leave_after_tokens is not None and answer.counted >= ask.leave_after_tokens:
                answer.left = True
                return
            if ask.pause:
                await asyncio.sleep(ask.pause)


def note(answer: Answer, found: dict[str, Any]) -> None:
    """Take what an event, or an answer in one piece, says."""
    if "error" in found:
        answer.error = found["error"]["message"]
        return
    if found.get("usage"):
        answer.usage = found["usage"]["completion_tokens"]
    for choice in found["choices"]:
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if "token_details" in choice:
            count = len(choice["token_details"])
        elif choice["logprobs"]:
            count = len(choice["logprobs"]["tokens"])
        else:
            count = int(not answer.tokens)
        if count:
            answer.tokens.append((time.perf_counter(), count))


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status of an answer, and its headers by lower-case name."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The pieces of a body, which has a length or comes in chunks."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
