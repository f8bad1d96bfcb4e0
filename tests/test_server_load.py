"""The server under load: a queue with ends, clients who leave, readers who do not read, requests that fail.

The engine's thread is held between two steps where a test needs to know what has happened by then.
"""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import NAME, Live, live, toy_engine

from moe_lm.engine import SamplingParams
from moe_lm.server import Limits, run

LONG = {"prompt": "the quick brown fox", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "def main", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Gate:
    """Lets an engine take as many steps as it is told, and all once it is opened or left."""

    def __init__(self, server: Live):
        self.server, self.steps, self.taken, self.is_open = server, threading.Semaphore(0), 0, False
        self.take = server.engine.step

    def __enter__(self) -> "Gate":
        self.server.engine.step = self.step
        return self

    def __exit__(self, *_) -> None:
        self.open()

    def step(self):
        if not self.is_open:
            self.steps.acquire()
        outputs = self.take()
        self.taken += 1
        return outputs

    def allow(self, steps: int) -> None:
        """Wait until so many more steps are over, or there is nothing left to do."""
        aim = self.taken + steps
        for _ in range(steps):
            self.steps.release()
        self.server.wait_until(lambda: self.taken >= aim or not self.server.engine.has_work)

    def open(self) -> None:
        self.is_open = True
        self.steps.release(1000)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as threads:
        yield threads


def waiting(server: Live) -> int:
    return len(server.service.worker.waiting)


def in_flight(server: Live) -> int:
    return len(server.service.worker.jobs)


def send(server: Live, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A connection with a request on it whose answer nobody reads."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({"model": NAME, **body}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    data = bytearray()
    while chunk := connection.recv(1 << 16):
        data += chunk
        if data.endswith(b"0\r\n\r\n"):
            break
    return bytes(data)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(max_waiting=4), "3 more would exceed max_waiting = 4"),
        (Limits(max_waiting_tokens=40), "max_waiting_tokens = 40"),
    ],
)
def test_a_full_queue_says_so_and_takes_more_later(limits, said, tokenizer, tmp_path, pool):
    engine = toy_engine(tokenizer, max_sequences=1)
    with live(engine, tmp_path, limits) as server, Gate(server) as gate:
        expected = pool.submit(server.complete, **SHORT)
        server.wait_until(lambda: engine.requests)
        gate.allow(1)
        server.wait_until(lambda: not waiting(server))
        more = []
        for count in range(2):
            more.append(pool.submit(server.complete, **SHORT))
            server.wait_until(lambda count=count: waiting(server) == count + 1)
        status, headers, body = server.request("/v1/completions", {"model": NAME, **SHORT, "prompt": ["a", "b", "c"]})
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        error = json.loads(body)["error"]
        assert said in error["message"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        gate.open()
        texts = {each.result()["choices"][0]["text"] for each in [expected, *more]}
        assert len(texts) == 1
        assert server.complete(**SHORT)["choices"][0]["text"] in texts
        server.assert_no_leak()


def test_more_prompts_than_the_queue_ever_takes_are_an_error_of_the_client(tokenizer, tmp_path):
    with live(toy_engine(tokenizer), tmp_path, Limits(max_waiting=2)) as server:
        status, found = server.json("/v1/completions", {"model": NAME, "prompt": ["a", "b", "c"]})
        assert status == 400
        assert "3 prompts, more than the 2 of max_waiting" in found["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "prefill", "verify"])
def test_who_leaves_frees_the_blocks_within_two_steps(phase, stream, tokenizer, tmp_path, pool):
    engine = toy_engine(tokenizer, max_sequences=1, max_step_tokens=16, adaptive=False, prefix_cache=False)
    with live(engine, tmp_path) as server, Gate(server) as gate:
        others = []
        if phase == "queued":
            others.append(pool.submit(server.complete, **LONG))
            server.wait_until(lambda: engine.requests)
            gate.allow(8)
        prompt = "the quick brown fox, 12345 times\n" * 4 if phase == "prefill" else "the"
        client = send(server, {**LONG, "prompt": prompt, "stream": stream})
        server.wait_until(lambda: in_flight(server) == 1 + len(others) and engine.requests)
        gate.allow({"queued": 1, "prefill": 2, "verify": 4}[phase])
        (request_id,) = [name for name in server.service.worker.jobs if name not in engine.requests or not others or
                         name == list(server.service.worker.jobs)[-1]]  # fmt: skip
        slots = {slot.request_id: slot.phase for slot in engine.snapshot().slots}
        assert slots.get(request_id, "queued") == phase
        held = engine.scheduler.pool.num_blocks - engine.scheduler.pool.available
        assert held
        client.close()
        server.wait_until(lambda: request_id not in server.service.worker.jobs)
        gate.allow(2)
        assert request_id not in {slot.request_id for slot in engine.snapshot().slots}
        assert request_id not in engine.requests
        if not others:
            assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks
        gate.open()
        for other in others:
            assert other.result()["usage"]["completion_tokens"] == LONG["max_tokens"]
        server.assert_no_leak()


def test_a_request_that_takes_too_long_is_ended(tokenizer, tmp_path, pool):
    with live(toy_engine(tokenizer), tmp_path, Limits(request_timeout=0.4)) as server, Gate(server) as gate:
        whole = pool.submit(server.json, "/v1/completions", {"model": NAME, **LONG})
        stream = pool.submit(server.events, "/v1/completions", LONG)
        status, found = whole.result()
        assert status == 504
        assert found["error"]["message"] == "the request took longer than request_timeout = 0.4 seconds."
        assert stream.result()[-1] == found
        gate.open()
        server.assert_no_leak()


def test_who_does_not_read_holds_up_nobody_and_gets_all(tokenizer, tmp_path):
    body = {**LONG, "n": 4, "stream": True, "token_details": True, "temperature": 1, "seed": 3, "max_tokens": 150}
    with live(toy_engine(tokenizer, deterministic=True), tmp_path, send_buffer=4096) as server:
        expected = server.complete(**{**body, "stream": False})
        client = send(server, body)
        server.wait_until(lambda: in_flight(server) == 1)
        # The engine is done with it although nothing has been read.
        server.wait_until(lambda: not in_flight(server))
        assert server.complete(**SHORT)["usage"]["completion_tokens"] == 8
        pool = server.engine.scheduler.pool
        assert pool.available == pool.num_blocks
        data = read_to_end(client).partition(b"\r\n\r\n")[2]
        events = [json.loads(part.partition(b"data: ")[2]) for part in data.split(b"\n\n")
                  if b"data: {" in part]  # fmt: skip
        client.close()
        texts = [""] * 4
        for choice in (choice for event in events for choice in event["choices"]):
            texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in expected["choices"]]
        # What came while nobody read was joined.
        assert len(events) < sum(len(choice["token_details"]) for choice in expected["choices"]) / 2


def test_who_never_reads_is_left_in_the_end(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "READING_SECONDS", 0.1)
    body = {**LONG, "n": 4, "stream": True, "token_details": True, "max_tokens": 150}
    with live(toy_engine(tokenizer), tmp_path, send_buffer=4096) as server:
        client = send(server, body)
        server.wait_until(lambda: in_flight(server) == 1)
        server.wait_until(lambda: not in_flight(server))
        connections = server.server.server_state.connections
        server.wait_until(lambda: not connections)
        client.close()
        server.assert_no_leak()


class Breaking:
    """A mask that fails at its third token."""

    def __init__(self):
        self.calls = 0

    def allowed(self):
        raise RuntimeError("broken on purpose") if self.calls > 2 else RuntimeError("broken at once")

    def advance(self, token):
        self.calls += 1

    def rollback(self, count):
        self.calls -= count


def test_one_requests_failure_is_its_own(tokenizer, tmp_path, monkeypatch, pool):
    with live(toy_engine(tokenizer), tmp_path) as server:
        expected = server.complete(**SHORT)["choices"]

        async def mask(form):
            return Breaking if form else None

        monkeypatch.setattr(server.service, "mask", mask)
        bad = {"model": NAME, **LONG, "response_format": {"type": "json_object"}}
        broken = [pool.submit(server.json, "/v1/completions", bad) for _ in range(3)]
        good = [pool.submit(server.complete, **SHORT) for _ in range(6)]
        stream = server.events("/v1/completions", bad)
        assert "broken at once" in stream[-1]["error"]["message"]
        for each in broken:
            status, found = each.result()
            assert (status, found["error"]["type"]) == (500, "server_error")
            assert "broken at once" in found["error"]["message"]
        assert all(each.result()["choices"] == expected for each in good)
        server.assert_no_leak()


def test_an_answer_never_depends_on_company(tokenizer, tmp_path, pool):
    """Sixteen requests at once through a cache that holds a few, each equal to what the engine alone gives."""
    asked = [
        {"prompt": ("the quick " * (i % 7 + 1))[: 9 * (i % 5) + 3], "max_tokens": 20 + i % 30, "temperature": i % 3 / 2,
         "seed": i, "n": i % 2 + 1, "ignore_eos": True}
        for i in range(16)
    ]  # fmt: skip
    alone = toy_engine(tokenizer, speculation="none", deterministic=True)
    expected = [
        alone.generate([each["prompt"]], SamplingParams(**{k: v for k, v in each.items() if k != "prompt"}))[0]
        for each in asked
    ]
    with live(toy_engine(tokenizer, kv_memory="128KiB", max_sequences=8, deterministic=True), tmp_path) as server:
        answers = list(pool.map(lambda each: server.complete(**each), asked))
        assert server.engine.stats.preemptions
        for answer, result in zip(answers, expected, strict=True):
            assert [choice["text"] for choice in answer["choices"]] == [each.text for each in result.samples]
            assert answer["usage"]["completion_tokens"] == sum(len(each.tokens) for each in result.samples)
        server.assert_no_leak()
