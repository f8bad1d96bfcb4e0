"""The two that serve the same requests: the server, a process of its own, and in another one the engine without it."""

import contextlib
import multiprocessing
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import moe_lm
from moe_lm.bench.client import Server
from moe_lm.bench.workload import Workload
from moe_lm.config import ConfigError, require

PROGRAM = Path(moe_lm.__file__).parents[1] / "serve.py"
START_SECONDS = 180
"""In which a server has to listen: compiling its native step takes about half a minute, once."""


class ServerProcess:
    """A server that was started here. `words` are the arguments of `program`, serve.py or one like it.

    Raises ConfigError where it does not start.
    """

    def __init__(self, words: list[str], program: Path = PROGRAM, folder: Path | None = None):
        require(program.is_file(), f"{program} is not there: run this from a source tree, or name a server with --url.")
        self.process = subprocess.Popen(
            [sys.executable, str(program), *words, "--port", "0"], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        """What it said."""
        listening: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self.read, args=(listening,), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            url = listening.get(timeout=START_SECONDS)
            if url is not None:
                self.url = url
                return
        self.end()
        raise ConfigError(f"the server has not started: {self.lines[-1] if self.lines else 'it said nothing'}")

    def read(self, listening: "queue.SimpleQueue[str | None]") -> None:
        """Keep the pipe empty, and tell where the server listens, None where it ends before."""
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("listening on "):
                listening.put(line.split()[-1])
        listening.put(None)

    def wait(self, seconds: float) -> int:
        """Its exit status; -9 if it has to be killed then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.end()

    def end(self) -> int:
        """Kill it if it still runs; its exit status."""
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


def server_at(url: str) -> Server:
    """Where a server of this machine listens, by its URL. Raises ConfigError for another machine's."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    require(
        parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost") and port is not None,
        f"--url {url} must be of this machine, with its port, such as http://127.0.0.1:8000: this is a load test.",
    )
    return Server("127.0.0.1" if parts.hostname == "localhost" else parts.hostname, port)


class BareEngine:
    """The same engine without HTTP; as a function, the seconds that it takes for a workload."""

    def __init__(self, ours: Connection):
        self.ours = ours

    def __call__(self, work: Workload) -> float:
        self.ours.send(work)
        return self.answer()

    def answer(self) -> float | None:
        """What comes next from its process: None once it is open, then seconds. Raises ConfigError where it failed."""
        found = self.ours.recv()
        if isinstance(found, ConfigError):
            raise found
        return found


@contextlib.contextmanager
def bare_engine(opening: dict[str, Any]) -> Iterator[BareEngine]:
    """Open an engine in a process of its own, which ends with the block; `opening` are open_engine's arguments."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_bare, args=(theirs, opening), daemon=True)
    process.start()
    theirs.close()
    try:
        yield BareEngine(ours)
    finally:
        process.kill()
        process.join()
        ours.close()


def serve_bare(theirs: Connection, opening: dict[str, Any]) -> None:
    """What that process does: workloads in, seconds out."""
    import torch

    from kernels.cpu.process import tune_process
    from moe_lm.engine import SamplingParams, open_engine
    from moe_lm.model.device import choose_device

    try:
        device, dtype = choose_device(opening.pop("device")), opening.pop("dtype")
        if device.type == "cpu":
            tune_process()
        engine = open_engine(**opening, dtype=dtype and getattr(torch, dtype), device=device)
        theirs.send(None)
        while True:
            work = theirs.recv()
            params = [SamplingParams(n, temperature=0, ignore_eos=True) for n in work.outputs]
            start = time.perf_counter()
            results = engine.generate(work.prompts, params)
            seconds = time.perf_counter() - start
            failed = next((each.samples[0] for each in results if each.samples[0].finish_reason != "length"), None)
            require(failed is None, f"the engine failed at a request: {failed and failed.error}")
            theirs.send(seconds)
    except ConfigError as error:
        theirs.send(error)
