"""serve.py as a process: where it listens, how it ends, and what it says where it cannot start."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import make_model, near_copy
from serving import Live, live, toy_engine
from test_architecture import ROOT

import serve
from moe_lm.bench.contenders import PROGRAM, ServerProcess
from moe_lm.checkpoint import save_hf
from moe_lm.config import ConfigError
from moe_lm.server import Limits

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 1200
"""Tokens that take a second at least: a step of the smallest model is one millisecond."""
PACED = """
import sys, time
from pathlib import Path

import serve
from moe_lm.cli import run_main
from moe_lm.engine import Engine

step, failing = Engine.step, Path(sys.argv.pop(1))


def paced(engine):
    if failing.exists():
        raise RuntimeError("as the test wants")
    time.sleep(0.02)
    return step(engine)


Engine.step = paced
run_main(serve.main)
"""
"""serve.py with steps of 20 ms at least, and an engine that fails once a file is there."""


class Remote(Live):
    """A server in a process of its own."""

    def __init__(self, process: ServerProcess, name: str):
        self.process, self.url, self.name = process, process.url, name

    def body(self, **fields):
        return {"model": self.name, "prompt": "def", "max_tokens": LONG, "ignore_eos": True, "temperature": 0} | fields

    @contextlib.contextmanager
    def stream(self):
        """The events of a long request, of which the first has come."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        body = json.dumps(self.body(stream=True, stream_options={"include_usage": True}))
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200
            events = (line.decode().removeprefix("data: ").rstrip() for line in answer if line != b"\n")
            assert json.loads(next(events))["choices"]
            yield events

    def terminate(self):
        """SIGTERM, and wait until the server has heard it."""
        self.process.process.send_signal(signal.SIGTERM)
        self.wait_until(lambda: self.json("/health") == (503, {"status": "draining"}))

    def end(self) -> int:
        """The exit status, which must come by itself."""
        return self.process.process.wait(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A directory with two runs, of which the newer one has a draft."""
    root = tmp_path_factory.mktemp("place")
    model = make_model(0, vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, hidden_size=32,
                       max_position_embeddings=2048)  # fmt: skip
    runs = {"runs/old": model, "runs/new": model, "runs/new/draft": near_copy(model)}
    for age, (run, weights) in enumerate(runs.items()):
        directory = root / run / "checkpoints" / "step-000001"
        directory.mkdir(parents=True)
        save_hf(directory, weights, tokenizer)
        os.utime(directory, (1e9 + age, 1e9 + age))
    (root / "paced.py").write_text(PACED, "utf-8")
    return root


@pytest.fixture(scope="module")
def servers(place):
    """All servers of this file, started side by side: importing torch is most of their start."""
    paced = ["runs/old", "--draft", "none"]
    starts = {
        "plain": ([], PROGRAM, place),
        "short drain": (["no", *paced, "--drain-seconds", "0.2"], place / "paced.py", place),
        "second signal": (["no", *paced], place / "paced.py", place),
        "failing": (["failing", *paced], place / "paced.py", place),
    }
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        futures = {name: pool.submit(ServerProcess, *start) for name, start in starts.items()}
    try:
        yield {name: Remote(future.result(), "new" if name == "plain" else "old") for name, future in futures.items()}
    finally:
        for future in futures.values():
            if not future.exception():
                future.result().end()


def test_the_newest_run_is_served_until_sigterm_and_what_is_in_flight_finishes(servers):
    server = servers["plain"]
    told, listening = server.process.lines[-2:]
    assert told.startswith(os.path.join("runs", "new, draft runs", "new", "draft. "))
    assert listening == f"listening on {server.url}"
    assert server.url.startswith("http://127.0.0.1:")
    status, found = server.json("/v1/completions", server.body(max_tokens=5))
    assert (status, found["model"], found["usage"]["completion_tokens"]) == (200, "new", 5)
    assert server.status()["speculation"] == "draft"
    with ThreadPoolExecutor() as pool, server.stream() as events:
        whole = pool.submit(server.json, "/v1/completions", server.body())
        server.wait_until(lambda: server.status()["running"] == 2)
        server.terminate()
        status, headers, data = server.request("/v1/completions", server.body(max_tokens=1))
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(data)["error"]["code"] == "draining"
        *rest, last = events
        assert last == "[DONE]"
        assert json.loads(rest[-1])["usage"]["completion_tokens"] == LONG
        status, found = whole.result()
        assert (status, found["choices"][0]["finish_reason"]) == (200, "length")
    assert server.end() == 0
    with pytest.raises(ConnectionRefusedError):
        server.request("/health")


def test_what_outlasts_the_drain_gets_an_error(servers):
    server = servers["short drain"]
    with ThreadPoolExecutor() as pool, server.stream() as events:
        whole = pool.submit(server.json, "/v1/completions", server.body())
        server.wait_until(lambda: server.status()["running"] == 2)
        server.process.process.send_signal(signal.SIGTERM)
        *_, error, last = events
        assert last == "[DONE]"
        status, found = whole.result()
    assert status == 503
    assert json.loads(error) == found
    assert found["error"]["code"] == "draining"
    assert "drain_seconds = 0.2" in found["error"]["message"]
    assert server.end() == 0


def test_a_second_sigterm_ends_what_is_in_flight(servers):
    server = servers["second signal"]
    with server.stream() as events:
        server.terminate()
        begin = time.monotonic()
        server.process.process.send_signal(signal.SIGTERM)
        *_, error, last = events
    assert (json.loads(error)["error"]["code"], last) == ("draining", "[DONE]")
    assert server.end() == 0
    assert time.monotonic() - begin < LONG * 0.02 / 2
    assert "Traceback" not in "".join(server.process.lines)


def test_a_dead_engine_ends_the_process(servers, place):
    server = servers["failing"]
    with server.stream() as events:
        (place / "failing").touch()
        *_, error, last = events
    assert (json.loads(error)["error"]["code"], last) == ("engine_dead", "[DONE]")
    assert server.end() == 1
    assert any("RuntimeError: as the test wants" in line for line in server.process.lines)


def test_a_dead_engine_is_told(tokenizer, tmp_path, monkeypatch):
    """To those in flight, to those who come later, and to who watches the server."""
    monkeypatch.setattr("moe_lm.server.run.LAST_WORDS", 60)
    engine = toy_engine(tokenizer)
    step = engine.step

    def failing():
        if len(engine.samples) == 2:
            raise RuntimeError("out of memory, say")
        return step()

    monkeypatch.setattr(engine, "step", failing)
    body = {"model": "toy", "prompt": "def", "max_tokens": 400, "ignore_eos": True}
    with live(engine, tmp_path, Limits()) as server, ThreadPoolExecutor() as pool:
        both = [pool.submit(server.json, "/v1/completions", body) for _ in range(2)]
        told = {"message": "the engine has stopped after an error, and the server ends.", "type": "server_error",
                "param": None, "code": "engine_dead"}  # fmt: skip
        assert [each.result() for each in both] == [(500, {"error": told})] * 2
        assert server.json("/health") == (503, {"status": "dead"})
        for path, late in (("/v1/completions", body), ("/status", None)):
            status, headers, data = server.request(path, late)
            assert (status, json.loads(data)) == (503, {"error": told})
            assert headers["retry-after"]


REFUSALS = {
    "--host 0.0.0.0": "--host 0.0.0.0 lets other machines in: give --api-key-file, or --no-auth",
    "--api-key-file nowhere.txt": "--api-key-file nowhere.txt cannot be read",
    "--api-key-file empty.txt": "empty.txt holds no key: write one on a line",
    "--api-key-file odd.txt": "key 2 of --api-key-file odd.txt must be ASCII without spaces",
    "--api-key-file keys.txt --no-auth": "--api-key-file and --no-auth exclude each other",
    "--port 0": "there is no trained run under runs/: make one with python train.py",
    "--port 70000": "--port 70000 must be between 0 and 65535",
    "nowhere --port 0": "there is no directory nowhere",
    "{place}/runs/new --port 0 --draft nowhere": "there is no directory nowhere",
    "{place}/runs/new --port 0 --draft none --speculation draft": "draft",
    "{place}/runs/new --port 0 --max-waiting 0": "max_waiting = 0 must be at least 1",
    "{place}/runs/new --port 0 --prot 1": "--prot is not a known setting; did you mean --port?",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", "\n# none\n"), ("odd", "good\ntwo words\n"), ("keys", "key\n")):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as error:
        serve.main(words.format(place=place).split())
    assert REFUSALS[words] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_port_that_is_taken_is_one_sentence_and_status_2(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(PROGRAM), "runs/old", "--port", str(port)], cwd=place, capture_output=True, text=True,
            timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cannot listen on 127.0.0.1 port {port}: ")
    assert len(done.stderr.splitlines()) == 1


def test_two_servers_that_start_at_once_do_not_get_the_same_port():
    from moe_lm.server import open_socket

    with open_socket("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="cannot listen"):
        open_socket("127.0.0.1", first.getsockname()[1])
