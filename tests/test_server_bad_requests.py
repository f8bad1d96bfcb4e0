"""Nothing that a client sends hurts the server: it answers with 4xx in a sentence, or does what can be done."""

import collections
import contextlib
import ctypes
import gc
import http.client
import itertools
import json
import os
import re
import socket
import statistics
import threading
import time
from pathlib import Path

import pytest
from bad_requests import BAD, GOOD, JSON, Asked, Requests
from serving import NAME, Live, live, toy_engine

from moe_lm.server import Limits, access

CLASS = re.compile(r"Traceback|pydantic|\b[A-Za-z]+(Error|Exception)\b|File \"|<class|0x[0-9a-f]{8}|function-")
"""What an error must not show of the program."""
BODY = 1 << 18


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory, one_thread):
    engine, directory = toy_engine(tokenizer, deterministic=True), tmp_path_factory.mktemp("model")
    hosts = access("127.0.0.1", None, False).hosts
    with live(engine, directory, Limits(max_body=BODY, body_seconds=0.3), hosts=hosts) as running:
        yield running


class Client:
    """One connection, kept while the server keeps it."""

    def __init__(self, server: Live):
        self.address = server.url.removeprefix("http://")
        self.connection = http.client.HTTPConnection(self.address, timeout=30)

    def send(self, asked: Asked) -> tuple[int, bytes]:
        try:
            self.connection.request(asked.method, asked.path, asked.body, asked.headers)
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        # The server may close a connection when it has answered; what it answered before is read by a new try.
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.connection.close()
            self.connection.request(asked.method, asked.path, asked.body, asked.headers)
            answer = self.connection.getresponse()
            return answer.status, answer.read()

    def close(self) -> None:
        self.connection.close()


def check(asked: Asked, status: int, body: bytes) -> None:
    sent = asked.body and asked.body[:2000]
    told = f"{asked.what}: {asked.method} {asked.path[:99]} {str(asked.headers)[:200]} {sent}\n-> {status} {body[:900]}"
    assert status == 200 or 400 <= status < 500, told
    assert status == 200 or asked.verdict != GOOD, told
    if status == 200:
        assert asked.verdict != BAD, told
        if asked.body:
            finished(body, told)
        return
    refused(body, told)


def refused(body: bytes, told: str) -> None:
    """The API's error, one short sentence that shows nothing of the program."""
    error = json.loads(body)
    assert set(error) == {"error"}, told
    error = error["error"]
    assert set(error) == {"message", "type", "param", "code"}, told
    message = error["message"]
    assert message.endswith((".", "?")), told
    assert len(message) < 600, told
    assert message.isprintable(), told
    assert not CLASS.search(message), told
    assert len(body) < 2000, told


def finished(body: bytes, told: str) -> None:
    """A stream has ended and no answer tells of an error."""
    if body.startswith(b"data: "):
        assert body.endswith(b"data: [DONE]\n\n"), told
        assert b'{"error"' not in body, told
    else:
        assert "error" not in json.loads(body), told


def state(server: Live) -> dict[str, int]:
    """What must be as before: threads and open files of the process."""
    return {"threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


def memory() -> float:
    """MiB that the process holds, without what is free and the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def answers(server: Live) -> list[object]:
    """What good requests get: the likeliest text, drawn ones, under a schema, in a chat; all with their numbers."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    bodies = [
        {"prompt": "def main(", "max_tokens": 12, "temperature": 0, "logprobs": 3},
        {"prompt": ["a", "the quick"], "max_tokens": 9, "seed": 4, "n": 2, "logprobs": 0},
        {"prompt": "a", "max_tokens": 30, "seed": 1, "response_format": form, "speculation": "ngram"},
    ]
    found = [server.complete(**body)["choices"] for body in bodies]
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": NAME, "messages": messages, "max_tokens": 8, "seed": 2, "logprobs": True}
    status, answer = server.json("/v1/chat/completions", chat)
    assert status == 200
    return [*found, answer["choices"]]


@contextlib.contextmanager
def unharmed(server: Live):
    """Good requests go on in the block, with the same bits as before it; after it all is as it was."""
    expected, differ, rounds, over = answers(server), [], [0], threading.Event()

    def go_on() -> None:
        while not over.is_set():
            try:
                if answers(server) != expected:
                    differ.append("other bits")
            except BaseException as error:
                differ.append(repr(error))
            rounds[0] += 1

    # The event loop's own helpers and the first answers of every kind are there from now on.
    before = state(server)
    beside = threading.Thread(target=go_on)
    beside.start()
    try:
        yield
    finally:
        over.set()
        beside.join(60)
    assert not differ, differ[0]
    assert rounds[0] > 0
    assert server.json("/health") == (200, {"status": "ok"})
    assert answers(server) == expected
    server.assert_no_leak()
    # The event loop keeps at most so many threads for work that is not its own.
    helpers = min(32, os.cpu_count() + 4)
    server.wait_until(lambda: state(server)["files"] <= before["files"])
    assert threading.active_count() <= before["threads"] + helpers


def fuzz(server: Live, seed: int, count: int) -> collections.Counter:
    """How many requests of each kind got which status."""
    requests, client, found = Requests(server.json("/openapi.json")[1], seed), Client(server), collections.Counter()
    try:
        for _ in range(count):
            asked = requests.next()
            status, body = client.send(asked)
            check(asked, status, body)
            found[asked.what, status] += 1
    finally:
        client.close()
    return found


def test_odd_requests(server):
    with unharmed(server):
        found = fuzz(server, seed=0, count=600)
    statuses = {status for _, status in found}
    assert {200, 400, 403, 404, 405, 415} <= statuses
    assert sum(count for (_, status), count in found.items() if status == 200) > 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_thousand_odd_requests(server, capsys):
    """Prints how many of each kind got which status, and what memory did."""
    found, sizes = fuzz(server, 1, 2000), [memory()]
    with unharmed(server):
        for seed in range(2, 12):
            found += fuzz(server, seed, 2000)
            sizes.append(memory())
    with capsys.disabled():
        print()
        for (what, status), count in sorted(found.items()):
            print(f"{what:10} {status} {count:6}")
        print("MiB:", " ".join(f"{size:.0f}" for size in sizes))
    assert sizes[-1] - sizes[0] < 30, sizes
    # A KiB lost at every request would be 2 MiB at every step; one step alone may bring a large grammar that is kept.
    assert statistics.median(after - before for before, after in itertools.pairwise(sizes)) < 2, sizes


PROMPT = {"model": NAME, "prompt": "a", "max_tokens": 4}


def schema(**keywords) -> dict:
    return PROMPT | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": keywords}}}


REFUSED = {
    "an integer that JSON has and the library has not": schema(type="integer", maximum=10**400),
    "a reason that ends in its marker": schema(type="string", format="error: "),
    "a schema that only itself explains": schema(**{"$ref": "#"}),
    "a reason of many characters": schema(type="string", format="a" * 20_000),
    "properties": schema(properties={f"a{i}": {} for i in range(10_000)}),
    "properties of several": schema(anyOf=[{"properties": {f"a{i}": {} for i in range(50)}}] * 40),
    "patterns at once": schema(allOf=[{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(60)]),
    "values": schema(enum=list(range(9000))),
    "a long schema": schema(const="a" * 40_000),
    "a key of several lines": PROMPT | {"logit_bias": {"\n": 1}},
    "a long key": PROMPT | {"logit_bias": {"1" * 100_000: 1}},
    "a long unknown name": PROMPT | {"a" * 100_000: 1},
    "biases": PROMPT | {"logit_bias": {str(i): 1 for i in range(5000)}},
    "a prompt over the context": PROMPT | {"prompt": [1] * 50_000},
    "prompts": PROMPT | {"prompt": ["a"] * 5000},
    "no context left": PROMPT | {"max_tokens": 2**31 - 1},
    "samples": PROMPT | {"n": 10**9},
    "empty stop": PROMPT | {"stop": ["a", ""]},
    "stops": PROMPT | {"stop": ["a"] * 65},
    "a bias for what is not there": PROMPT | {"logit_bias": {"260": 1}},
    "an end that is not there": PROMPT | {"stop_token_ids": [260]},
    "samples of nothing": PROMPT | {"n": 2, "max_tokens": 0},
    "stream_options without stream": PROMPT | {"stream_options": {"include_usage": True}},
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(server, what):
    start = time.monotonic()
    asked = Asked(what, "POST", "/v1/completions", JSON, json.dumps(REFUSED[what]).encode(), BAD)
    check(asked, *Client(server).send(asked))
    assert time.monotonic() - start < 5
    server.assert_no_leak()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GARBAGE = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 9, b"400"),
    "a line without end": (b"GET /" + b"a" * 200_000, b"400"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
    "huge headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 30_000 + b"\r\n", b"400"),
    "a header of several lines": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\rb\0\r\n\r\n", b"400"),
    "a length that is none": (POST + b"Content-Length: -5\r\n\r\n", b"400"),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345", b"400"),
    "a length above what comes": (POST + b"Content-Length: 100\r\n\r\n{}", b"408"),
    "a length below what comes": (POST + b"Content-Length: 2\r\n\r\n{}{}{}{}\r\n\r\n", b"400"),
    "a length beyond all": (POST + b"Content-Length: %d\r\n\r\n{}" % 10**18, b"413"),
    "a length beyond all numbers": (POST + b"Content-Length: %d\r\n\r\n{}" % 10**400, b"4"),
    "chunks that are none": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"4"),
    "chunks without end": (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
    "chunks beyond the limit": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n" + b"8000\r\n" * 9
        + (b" " * 0x8000 + b"\r\n8000\r\n") * 9, b"4",
    ),
}  # fmt: skip
"""Bytes that end in no answer of the API, and how the status of what comes back begins."""


def exchanged(server: Live, sent: bytes) -> bytes:
    """What the server says to these bytes until it closes or has nothing to say."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        # It may close while it is still sent to, and what it said is lost where it was not read before.
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while b"\r\n\r\n" not in received and (data := connection.recv(1 << 16)):
                received += data
    return received


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(server, what):
    sent, status = GARBAGE[what]
    received = exchanged(server, sent)
    assert received.startswith(b"HTTP/1.1 " + status), received[:300]
    assert not CLASS.search(received.decode("latin-1")), received
    assert server.json("/health")[0] == 200
    server.assert_no_leak()


def test_clients_that_say_half_and_leave(server):
    """Any part of a request, cut anywhere, leaves nothing behind."""
    body = json.dumps(PROMPT | {"max_tokens": 400, "stream": True}).encode()
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with unharmed(server):
        for end in [*range(0, len(whole), 7), len(whole)]:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(whole[:end])


@pytest.mark.parametrize("length", [BODY, BODY + 1])
def test_bodies_at_the_limit(server, length):
    """With and without a Content-Length."""
    body = json.dumps(PROMPT).encode().ljust(length)
    expected = 200 if length <= BODY else 413
    asked = Asked("long", "POST", "/v1/completions", JSON, body, GOOD if expected == 200 else BAD)
    status, answer = Client(server).send(asked)
    check(asked, status, answer)
    assert status == expected
    chunked = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(chunked):
        parts = [body[place : place + 50_000] for place in range(0, length, 50_000)]
        chunked.request("POST", "/v1/completions", iter(parts), JSON, encode_chunked=True)
        assert chunked.getresponse().status == expected


def test_keys_and_what_is_none(tokenizer, tmp_path):
    odd = [
        "", "Bearer", "Bearer ", "Bearer  ", "bearer x", "Basic c2VjcmV0", "secret", "Bearer secre", "Bearer secretx",
        "Bearer \xe9", "Bearer secret secret", "Bearer\tsecret", "Bearer " + "a" * 30_000,
    ]  # fmt: skip
    with live(toy_engine(tokenizer), tmp_path, keys=["secret"]) as server:
        for given in odd:
            for path in ("/v1/models", "/status", "/metrics", "/v1/completions", "/static", "/health%0a", "/./health"):
                asked = Asked("key", "GET", path, {"Authorization": given}, None, BAD)
                status, body = Client(server).send(asked)
                check(asked, status, body)
                assert status == 401
        for given in ("Bearer secret", "bearer  secret "):
            assert server.request("/v1/models", headers={"Authorization": given})[0] == 200


def test_a_user_writes_no_line_of_the_log(server, caplog):
    """Nor a header."""
    forged = "me\r\nSet-Cookie: a=1\n\x1b[31m2026-01-01 cmpl-0 user='root' done"
    with caplog.at_level("INFO", logger="moe_lm.server"):
        server.complete(**PROMPT | {"user": forged})
        for name in ("%0d%0aSet-Cookie:%20a=1", "a" * 2000):
            status, headers, body = server.request(f"/v1/models/{name}")
            assert status == 404
            assert "set-cookie" not in {name.lower() for name in headers}
            refused(body, name)
    [line] = [record.getMessage() for record in caplog.records if record.name == "moe_lm.server"]
    assert line.isprintable()


def big(begin: bytes, unit: bytes, end: bytes, size: int = (4 << 20) - 64) -> bytes:
    """Very many of a unit."""
    return begin + b",".join([unit] * ((size - len(begin) - len(end)) // (len(unit) + 1))) + end


START = b'{"model":"toy","max_tokens":4,"prompt":'
CHAT = b'{"model":"toy","max_tokens":4,"messages":[{"role":"user","content":'
BIG = {
    "token ids": ("/v1/completions", big(START + b"[", b"1", b"]}"), 400),
    "numbers": ("/v1/completions", big(START + b"[", b"1.5", b"]}"), 400),
    "texts and one number": ("/v1/completions", big(START + b"[", b'"a"', b",1]}"), 400),
    "lists": ("/v1/completions", big(START + b"[", b"[]", b"]}"), 400),
    "a text": ("/v1/completions", big(START + b'"', b"a", b'"}'), 400),
    "a stop text": ("/v1/completions", big(START + b'"a","stop":"', b"a", b'"}'), 200),
    "same keys": ("/v1/completions", big(START + b'"a","logit_bias":{', b'"1":1', b"}}"), 200),
    "parts": ("/v1/chat/completions", big(CHAT + b"[", b'{"type":"text","txt":"a"}', b"]}]}"), 400),
    "spaces": ("/v1/chat/completions", CHAT + b'"' + b" " * (4 << 19) + b'"}]}', 200),
    "tokens": ("/detokenize", big(b'{"tokens":[', b"5", b"]}", 2_000_000), 200),
    "nulls": ("/detokenize", big(b'{"tokens":[', b"null", b"]}"), 400),
    "depth": ("/tokenize", b"[" * (4 << 20), 400),
}  # fmt: skip


def test_no_big_body_keeps_the_others_waiting(tokenizer, tmp_path):
    """Alone on two cores the longest wait for /health was 0.3 s; before the bounds on lists, 26 s."""
    with live(toy_engine(tokenizer), tmp_path) as server:
        waits, over = [0.0], threading.Event()

        def ask() -> None:
            asked, client = Asked("health", "GET", "/health", {}, None, GOOD), Client(server)
            while not over.is_set():
                start = time.monotonic()
                assert client.send(asked)[0] == 200
                waits.append(time.monotonic() - start)
                over.wait(0.005)
            client.close()

        beside = threading.Thread(target=ask)
        beside.start()
        try:
            for what, (path, body, status) in BIG.items():
                asked = Asked(what, "POST", path, JSON, body, BAD if status == 400 else GOOD)
                client = Client(server)
                check(asked, *client.send(asked))
                client.close()
        finally:
            over.set()
            beside.join(30)
        assert max(waits) < 1.5, max(waits)
        server.assert_no_leak()
