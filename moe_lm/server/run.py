"""The process of a server: its socket, its signals, its end."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from moe_lm.config import ConfigError, require
from moe_lm.server.errors import Unavailable
from moe_lm.server.service import Service

log = logging.getLogger("moe_lm.server")

LAST_WORDS = 1.0
"""Seconds in which a server whose engine is dead still tells so."""
CLOSING_SECONDS = 5
"""That answers which are written already have to reach their readers at the end."""
READING_SECONDS = 60
"""In which a client has to take something of what is written to it."""
MOST_CONNECTIONS = 4096
BACKLOG = 2048
"""Connections that may wait to be taken; uvicorn's number."""


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises ConfigError where there can be none."""
    # The system's resolver takes 70000 for 4464.
    require(0 <= port <= 65535, f"--port {port} must be between 0 and 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Without the protocol asyncio does not see that this is TCP, and leaves on what holds small packets for 40 ms.
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Two programs may bind one address while neither listens; and who comes while the model is read shall wait.
        listening.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose others with --host, --port.") from None
    return listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, service: Service, listening: socket.socket) -> int:
    """Serve until a signal or the engine's end; the exit status of the process, 0 or 1.

    SIGTERM or Ctrl-C: no new work; what is in flight has the limits' drain_seconds. A second one ends that too, with an
    error to each, after the step that the engine is in; a third does not wait for it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=CLOSING_SECONDS,
        limit_concurrency=MOST_CONNECTIONS, proxy_headers=False,
    )  # fmt: skip
    worker = service.worker
    server = Server(config, service)
    asyncio.run(server.serve(sockets=[listening]))
    if worker.dead:
        log.error("the engine has stopped after an error", exc_info=worker.dead)
    return 1 if worker.dead or not server.started else 0


class Server(uvicorn.Server):
    """Uvicorn's, which goes on answering while requests in flight finish."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.worker = service.worker
        self.signals = 0
        """That came since it listens."""
        self.tasks: list[asyncio.Task] = []
        self.unread: dict[Any, tuple[int, float]] = {}
        """Connections with bytes that wait to be taken: how many, and since when so many."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.tasks.append(self.loop.create_task(self.end_with_engine()))
        # Only now: whoever waits for this line connects at once.
        for listening in sockets or ():
            print(f"listening on {url_of(listening)}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            self.drop_who_does_not_read()
        return await super().on_tick(counter)

    def drop_who_does_not_read(self) -> None:
        """Only this ends a connection with bytes in it: to close one waits until they are taken."""
        now, before = time.monotonic(), self.unread
        sizes = {each: each.transport.get_write_buffer_size() for each in self.server_state.connections}
        self.unread = {
            each: before[each] if each in before and before[each][0] == size else (size, now)
            for each, size in sizes.items()
            if size
        }
        for connection, (_, since) in self.unread.items():
            if now - since > READING_SECONDS:
                connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal's handler; what uvicorn's own does would end the process by that signal."""
        self.signals += self.started
        if self.signals == 0:
            self.should_exit = True
        elif self.signals == 1:
            log.info(
                "%s: no new requests, %d in flight, at most %g s", signal.Signals(sig).name, len(self.worker.jobs),
                self.worker.limits.drain_seconds,
            )  # fmt: skip
            self.loop.call_soon_threadsafe(lambda: self.tasks.append(self.loop.create_task(self.end())))
        elif self.signals == 2:
            told = Unavailable("the server was told twice to end, before the request had ended.", code="draining")
            self.loop.call_soon_threadsafe(self.worker.fail_all, told)
        else:
            # The interpreter's own end would have torch abort the process amid a step.
            os._exit(1)

    async def end(self) -> None:
        await self.worker.drain(self.worker.limits.drain_seconds)
        self.should_exit = True

    async def end_with_engine(self) -> None:
        await self.worker.died.wait()
        await asyncio.sleep(LAST_WORDS)
        self.should_exit = True
