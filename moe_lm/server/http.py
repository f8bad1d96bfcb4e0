"""What HTTP needs around the endpoints: bodies that end, clients that leave, events, keys."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_lm.server.errors import ApiError, Forbidden, TooLarge, TooSlow, Unauthorized, UnsupportedMedia
from moe_lm.server.limits import Limits

T = TypeVar("T")

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""That need no key, and whatever lies below /static/."""
SECURITY_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request. Raises ApiError where it is no JSON, too large, or does not come."""
    kind = request.headers.get("content-type", "")
    # Browsers send JSON across sites only where the server allows it, other types without asking.
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMedia(f"Content-Type is {kind[:100]!r}; it must be application/json.")
    told = request.headers.get("content-length", "0")
    size = int(told) if told.isdecimal() and len(told) < 20 else 0
    too_large = TooLarge(f"the body has more than the {limits.max_body} bytes of max_body: shorten it.")
    if size > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {limits.body_seconds:g} s: send all of it at once.") from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. When the client leaves first it is cancelled, and ClientDisconnect raised."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(send: Send, events: AsyncIterator[dict[str, Any]]) -> ApiError | None:
    """Server-sent events, ended by [DONE]; an ApiError on the way becomes the last event before it, and is returned."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
               (b"x-accel-buffering", b"no")]  # fmt: skip
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    failure = None
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                # A fifth of the time of json.dumps, which was a tenth of what the event loop does for a token.
                await send_event(send, to_json(event))
    except ApiError as error:
        failure = error
        await send_event(send, to_json(error.body()))
    await send_event(send, b"[DONE]")
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return failure


async def send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})


def refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Guard:
    """Middleware: who may come in, and the headers that every answer has.

    `keys` are what a request's bearer token must be one of; none lets all in. `hosts` are the names that a request may
    call this server by, None for any: a page of another site that has its own name resolve to this machine is refused.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: frozenset[str] | None):
        self.app, self.keys, self.hosts = app, [key.encode() for key in keys], hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        try:
            self.check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await refusal(error)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def check(self, path: str, headers: Headers) -> None:
        """Raises Forbidden or Unauthorized."""
        host = headers.get("host", "").rpartition("@")[2]
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and name.lower() not in self.hosts:
            raise Forbidden(
                f"this server is not known as {host[:100]!r}: a server without keys answers only to "
                f"{', '.join(sorted(self.hosts))}; use one of them, or --api-key-file."
            )
        if not self.keys or path in OPEN_PATHS or path.startswith("/static/"):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, each in constant time, so that the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self.keys):
            raise Unauthorized(
                "the API key is missing or wrong: send one of this server's as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
