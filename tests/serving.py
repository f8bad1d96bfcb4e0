"""A server on the loopback interface, in a thread of the tests' process, around a model of random weights."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from engines import make_model, near_copy

from moe_lm.engine import Engine
from moe_lm.server import Limits, Service, make_app, open_socket, url_of
from moe_lm.server.run import Server
from moe_lm.server.tokens import TokenTexts

NAME = "toy"


class Live:
    """A running server. `url` has no slash at its end."""

    def __init__(self, service: Service, server: Server, url: str):
        self.service, self.server, self.url = service, server, url
        self.engine = service.engine

    def request(
        self, path: str, body: Any = None, *, raw: bytes | None = None, headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
        """Status, headers and body of one request; JSON is posted where there is a body."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = ({"Content-Type": "application/json"} if data is not None else {}) | (headers or {})
        with contextlib.closing(connection):
            connection.request(method or ("GET" if data is None else "POST"), path, data, given)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def json(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        status, _, data = self.request(path, body, **options)
        return status, json.loads(data)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer of /v1/completions."""
        status, found = self.json("/v1/completions", {"model": NAME, **fields})
        assert status == 200, found
        return found

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All events of a stream, which ends with [DONE]."""
        status, headers, data = self.request(path, {"model": NAME, "stream": True, **body})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def status(self) -> dict[str, Any]:
        return self.json("/status")[1]

    def wait_until(self, condition, seconds: float = 20) -> None:
        """Poll until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.005)

    def assert_no_leak(self) -> None:
        """All that was asked is over, and every block is free."""
        self.wait_until(lambda: not self.service.worker.jobs and not self.engine.requests and not self.engine.reports)
        pool = self.engine.scheduler.pool
        pool.check()
        assert pool.available == pool.num_blocks
        assert not self.engine.samples
        assert not self.service.worker.waiting
        assert not self.service.worker.unstarted


@contextlib.contextmanager
def live(
    engine: Engine, directory: Path, limits: Limits | None = None, send_buffer: int | None = None, **options: Any
) -> Iterator[Live]:
    """Serve an engine while the block runs; `send_buffer` is that of its sockets, options are those of make_app."""
    service = Service(engine, NAME, directory, limits or Limits())
    listening = open_socket("127.0.0.1", 0)
    if send_buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(uvicorn.Config(make_app(service, **options), log_level="warning", access_log=False), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server has ended"
            assert time.monotonic() < end
            time.sleep(0.005)
        yield Live(service, server, url_of(listening))
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def toy_engine(tokenizer, seed: int = 0, ascii_only: bool = False, context: int = 512, **settings: Any) -> Engine:
    """An engine on a mixture of random weights that guesses with a draft which is mostly right.

    Its tokens are bytes in any order, hardly ever a character of several; with `ascii_only` the likeliest is none.
    """
    model = make_model(seed, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=context)
    if ascii_only:
        texts = TokenTexts(tokenizer)
        plain = [token for token in range(1, len(texts.bytes)) if texts.of(token).isascii()]
        others = [token for token in range(len(texts.bytes)) if token not in plain]
        with torch.no_grad():
            # As likely as another one before it: of equals the first is taken.
            model.lm_head.weight[others] = model.lm_head.weight[plain[0]].clone()
    settings = {"kv_memory": "8MiB", "stop_ids": (0,)} | settings
    return Engine(model, tokenizer, near_copy(model), **settings)
