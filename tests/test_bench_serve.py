"""The load test of the server: what it notices, how it counts, and one short run against a server that works."""

import asyncio
import dataclasses
import itertools
import json
import random

import pytest
from engines import make_model
from serving import live, toy_engine

from moe_lm.bench import load, serve
from moe_lm.bench.client import Answer, Ask, read_events
from moe_lm.bench.contenders import ServerProcess, server_at
from moe_lm.bench.load import Phase
from moe_lm.checkpoint import save_hf
from moe_lm.config import ConfigError
from moe_lm.server import Limits

pytestmark = pytest.mark.usefixtures("one_thread")

EMPTY = {"running": 0, "waiting": 0, "kv": {"used": 0}}
GREEDY, DRAWN, SHORT = Ask([1], 3), Ask([1], 3, greedy=False), Ask([1], 3, counted=False)


def answered(ask: Ask = GREEDY, **changes) -> Answer:
    """A request of 3 tokens as it should end, sent at 10 s, with one token at 11 s and two at 14 s."""
    whole = Answer(ask, 10.0, 15.0, status=200, finish_reason="length", done=True, usage=3, tokens=[(11, 1), (14, 2)])
    return dataclasses.replace(whole, **changes)


def phase(*answers: Answer, **changes) -> Phase:
    counted = {"moe_lm_requests_total": 1.0, 'moe_lm_requests_finished_total{reason="length"}': 1.0}
    return dataclasses.replace(Phase("p", 1.0, 5.0, list(answers), counted, EMPTY), **changes)


FINE = {
    "greedy": answered(),
    "drawn, ended by itself": answered(DRAWN, finish_reason="stop", usage=2, tokens=[(11, 2)]),
    "not counted": answered(SHORT, tokens=[(11, 1)]),
    "left": Answer(GREEDY, 10.0, 11.0, left=True),
    "rejected": Answer(GREEDY, 10.0, 11.0, status=429, retry_after="1", error="full"),
    "refused": Answer(GREEDY, 10.0, 11.0, status=503, retry_after="1", error="ending"),
    "unreachable": Answer(GREEDY, 10.0, 11.0),
}
WRONG = {
    "an answer without its end": (answered(done=False), "a request failed with status 200: its answer has no end"),
    "no finish_reason": (answered(finish_reason=None), "its answer has no end"),
    "an error on the way": (answered(error="oh"), "a request failed with status 200: oh"),
    "a broken connection": (answered(status=None, error="EOFError: 0"), "failed with status None: EOFError"),
    "no Retry-After": (Answer(GREEDY, 0.0, status=429, error="full"), "status 429 came without Retry-After"),
    "no usage": (answered(usage=None), "an answer has no usage"),
    "a lost token": (answered(tokens=[(11, 2)]), "usage says 3 tokens, and 2 came"),
    "too many tokens": (answered(usage=4, tokens=[(11, 4)]), "4 tokens came of 3 with finish_reason length"),
    "too few tokens": (answered(usage=2, tokens=[(11, 2)]), "2 tokens came of 3 with finish_reason length"),
    "an end that was to be ignored": (answered(finish_reason="stop"), "a request ended with finish_reason stop"),
    "an abort": (answered(DRAWN, finish_reason="abort"), "a request ended with finish_reason abort"),
}
LEAKS = {
    "a block": ({"status": EMPTY | {"kv": {"used": 2}}}, "kv.used = 2 with nothing left to do"),
    "a sample": ({"status": EMPTY | {"running": 1}}, "running = 1 with nothing left to do"),
    "a queue": ({"status": EMPTY | {"waiting": 1}}, "waiting = 1 with nothing left to do"),
    "a request": ({"counted": {"moe_lm_requests_total": 2.0}}, "counts 2 requests accepted, but 0 ended"),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_is_as_it_should_be_is_no_complaint(kind):
    assert FINE[kind].outcome == (kind if kind in load.OUTCOMES else "answered")
    assert load.complaints(phase(FINE[kind])) == []


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_noticed(kind):
    answer, sentence = WRONG[kind]
    [said] = load.complaints(phase(answered(), answer))
    assert sentence in said
    assert said.startswith("p: ")
    assert said.endswith("(1 of 2 requests).")


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_is_noticed(kind):
    changes, sentence = LEAKS[kind]
    [said] = load.complaints(phase(answered(), **changes))
    assert sentence in said


def test_a_hundred_wrong_answers_are_one_sentence():
    answers = [answered(usage=9, tokens=[(11, 9 - i % 2)]) for i in range(100)]
    said = load.complaints(phase(*answers))
    assert [sentence.partition("(")[2] for sentence in said] == ["50 of 100 requests).", "50 of 100 requests)."]


def test_an_end_that_is_none_is_noticed():
    flying, refused = phase(answered(), status=None), phase(FINE["refused"], FINE["unreachable"], status=None)
    assert load.drain_complaints(flying, refused, 0) == []
    cut = phase(answered(done=True, error="the server ended before the request did"), status=None)
    assert load.drain_complaints(cut, refused, 0) == []
    [said] = load.drain_complaints(phase(answered(done=False), status=None), refused, 0)
    assert "its answer has no end" in said
    [said] = load.drain_complaints(flying, phase(answered(), FINE["refused"]), 0)
    assert said == "1 of 2 requests that came after SIGTERM were not refused."
    [said] = load.drain_complaints(flying, phase(FINE["unreachable"]), 0)
    assert said.startswith("no request could be tried after SIGTERM")
    [said] = load.drain_complaints(flying, refused, -6)
    assert said == "the server ended with exit status -6 after SIGTERM."


def test_tokens_of_one_event_share_its_time():
    told = load.latencies([answered(), answered(Ask([1], 3, stream=False), tokens=[(15, 3)])])
    assert told == {"first": [1], "between": [1.5, 1.5], "whole": [5, 5]}
    assert load.latencies([FINE["not counted"]])["between"] == []
    line = load.record(phase(answered(), FINE["left"], answered(Ask([1], 3, pause=0.1), sent=0.0)))
    assert (line["sent"], line["answered"], line["left"], line["failed"]) == (3, 2, 1, 0)
    assert (line["requests_per_s"], line["tokens_per_s"]) == (2 / 5, 6 / 5)
    assert line["whole"] == {"p50": 5, "p90": 5, "p99": 5, "mean": 5}  # the slow reader's is not the server's


def test_quantiles_of_values_and_of_buckets():
    values = [i / 100 for i in range(1, 101)]
    random.Random(0).shuffle(values)
    assert load.figures(values) == pytest.approx({"p50": 0.51, "p90": 0.91, "p99": 1.0, "mean": 0.505})
    assert load.figures([]) is None
    name = load.HISTOGRAMS["first"]
    counts = {"0.1": 10.0, "0.5": 50.0, "1.0": 100.0, "+Inf": 100.0}
    counted = {f'{name}_bucket{{le="{bound}"}}': count for bound, count in counts.items()}
    counted |= {f"{name}_count": 100.0, f"{name}_sum": 50.5}
    assert load.histogram(counted, name) == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99, "mean": 0.505})
    assert load.histogram({f"{name}_count": 0.0}, name) is None
    beyond = {f'{name}_bucket{{le="{bound}"}}': count for bound, count in {"0.1": 1.0, "+Inf": 10.0}.items()}
    assert load.histogram(beyond | {f"{name}_count": 10.0, f"{name}_sum": 9.0}, name)["p90"] == 0.1


def test_latencies_that_the_server_does_not_know_of_are_noticed():
    line = load.record(phase(answered()))
    assert [each.partition(" is ")[2] for each in load.disagreements(line)] == [
        "1.0000 s here, and nothing in /metrics.", "1.5000 s here, and nothing in /metrics.",
        "5.0000 s here, and nothing in /metrics.",
    ]  # fmt: skip
    line["server"] = {"first": {"mean": 0.99}, "between": {"mean": 1.45}, "whole": {"mean": 4.9}}
    assert load.disagreements(line) == []
    for mean in (3.0, 9.0):
        line["server"]["whole"] = {"mean": mean}
        assert load.disagreements(line) == [f"p: mean latency (whole) is 5.0000 s here, and {mean:.4f} s in /metrics."]


def test_arrivals_are_as_many_as_their_rate():
    class Instant:
        async def ask(self, ask):
            return answered(ask)

    asks = itertools.repeat(GREEDY)
    answers = asyncio.run(load.arrive(Instant(), asks, 2000, 0.2, random.Random(0)))
    assert 340 < len(answers) < 460
    draw = random.Random(0)
    crowd = [load.unruly(draw, GREEDY, 1.0) for _ in range(4000)]
    leaving = [ask for ask in crowd if ask.leave_after_seconds is not None or ask.leave_after_tokens is not None]
    assert len(leaving) / 4000 == pytest.approx(load.LEAVING, abs=0.02)
    assert sum(ask.pause > 0 for ask in crowd) / 4000 == pytest.approx(load.SLOW, abs=0.02)
    assert sum(not ask.stream for ask in crowd) / 4000 == pytest.approx(load.WHOLE, abs=0.02)
    assert {ask.leave_after_tokens for ask in crowd} == {None, 1, 2}


ASKS = {
    "stream": (Ask([5, 6], 20), "answered", 20),
    "in one piece": (Ask([5, 6], 20, stream=False), "answered", 20),
    "not counted": (Ask([5, 6], 20, counted=False), "answered", 1),
    "slow": (Ask([5, 6], 20, pause=0.001), "answered", 20),
    "too long": (Ask([5, 6], 9999), "failed", 0),
    "gone after tokens": (Ask([5, 6], 400, leave_after_tokens=3), "left", None),
    "gone after a moment": (Ask([5, 6], 400, leave_after_seconds=0.01), "left", None),
}


def test_the_client_reads_what_the_server_sends(tokenizer, tmp_path):
    """All clients at once, and the server is empty after them."""
    with live(toy_engine(tokenizer), tmp_path, Limits()) as server:
        client = dataclasses.replace(server_at(server.url), model="toy")
        before = Phase("all", 1.0)
        work = load.at_once(client, [ask for ask, _, _ in ASKS.values()])
        asyncio.run(load.measured(client, before, work))
        server.assert_no_leak()
    for (kind, (_, outcome, tokens)), answer in zip(ASKS.items(), before.answers, strict=True):
        assert (kind, answer.outcome) == (kind, outcome)
        if tokens is not None:
            assert (kind, answer.counted, answer.usage) == (kind, tokens, 20 if outcome == "answered" else None)
            assert sorted(answer.tokens) == answer.tokens
    [said] = load.complaints(before)
    assert "failed with status 400" in said
    assert load.histogram(before.counted, load.HISTOGRAMS["whole"])["mean"] > 0


def test_a_stream_that_goes_on_after_its_end_is_noticed():
    async def read(*chunks):
        async def source():
            for chunk in chunks:
                yield chunk

        answer = answered(done=False, tokens=[])
        await read_events(answer, source())
        return answer

    event = b'data: {"choices":[{"finish_reason":"length","logprobs":{"tokens":["a","b"]}}]}\n\n'
    split = asyncio.run(read(event[:9], event[9:] + event[:30], event[30:] + b"data: [DONE]\n\n"))
    assert (split.counted, split.done) == (4, True)
    assert not asyncio.run(read(event)).done
    with pytest.raises(ValueError, match="is no event before the end"):
        asyncio.run(read(b"data: [DONE]\n\n", event))
    with pytest.raises(ValueError, match="is no event before the end"):
        asyncio.run(read(b"event: x\n\n"))


REFUSALS = {
    "m --turns 0": "--turns 0 must be at least 1",
    "m --seconds 0": "--seconds 0.0 must be above 0",
    "m --url http://example.org:80": "must be of this machine",
    "m --url http://127.0.0.1": "must be of this machine, with its port",
    "m --url http://127.0.0.1:x": "must be of this machine, with its port",
    "m --url http://127.0.0.1:1": "nobody answers at http://127.0.0.1:1: ",
    "": "there is no trained run under runs/",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A directory with a small model `m`, whose context is long enough for the load to be cut short by a signal."""
    root = tmp_path_factory.mktemp("place")
    (root / "m").mkdir()
    model = make_model(0, vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, hidden_size=32,
                       max_position_embeddings=512)  # fmt: skip
    save_hf(root / "m", model, tokenizer)
    return root


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError) as error:
        serve.main(words.split())
    assert REFUSALS[words] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "said"), [("import sys; sys.exit('no such model.')", "no such model."), ("", "it said nothing")]
)
def test_a_server_that_does_not_start_is_said(program, said, tmp_path):
    (tmp_path / "program.py").write_text(program, "utf-8")
    with pytest.raises(ConfigError, match=f"^the server has not started: {said}"):
        ServerProcess([], tmp_path / "program.py")
    with pytest.raises(ConfigError, match="run this from a source tree, or name a server with --url"):
        ServerProcess([], tmp_path / "nowhere.py")


def test_a_run_from_end_to_end(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("kernels.bench.measure.busy", lambda: None)
    # A step of this model takes less than what other work on the machine takes from it.
    monkeypatch.setattr(load, "SLACK", 5.0)
    status = serve.main(["m", "--quick", "--turns", "1", "--seconds", "0.4", "--json"])
    out, table = capsys.readouterr()
    found = json.loads(out)
    assert (status, found["failures"]) == (0, [])
    assert len(out.splitlines()) == 1
    assert found["server"] == {"speculation": "none", "draft": False, "max_sequences": 64, "max_waiting": 12,
                               "num_hidden_layers": 1, "num_experts": 8, "max_model_len": 512}  # fmt: skip
    assert [(line["name"], line["batch"]) for line in found["cost"]] == [("decode", 4), ("saturation", 16)]
    for line in found["cost"]:
        assert line["ratio"] == pytest.approx(line["tokens_per_s"] / line["engine_tokens_per_s"])
        assert f"{line['name']:16}  {line['batch']:5}" in table
    assert [line["name"] for line in found["phases"]] == ["0.25x", "0.5x", "0.9x", "10x"]
    for line in found["phases"]:
        assert line["sent"] == sum(line[outcome] for outcome in load.OUTCOMES) > 0
        assert line["failed"] == line["refused"] == line["unreachable"] == 0
        assert line["answered"] > 0
        for name in ("first", "whole"):
            for figures in (line[name], line["server"][name]):
                assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"]
    assert found["phases"][-1]["left"] > 0
    drain = found["drain"]
    assert drain["in_flight"]["answered"] >= 4
    assert drain["late"]["refused"] > 0
    assert drain["exit_status"] == 0
    assert "exit status 0" in table


def test_a_server_that_runs_is_only_loaded_and_a_leak_ends_in_status_1(place, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("kernels.bench.measure.busy", lambda: None)
    monkeypatch.setattr(load, "SLACK", 5.0)
    monkeypatch.setattr(load, "IDLE_SECONDS", 0.2)
    engine = toy_engine(tokenizer)
    with live(engine, place / "m", Limits(max_waiting=8)) as server:
        engine.scheduler.pool.allocate(2)
        status = serve.main(["m", "--url", server.url, "--quick", "--turns", "1", "--seconds", "0.2"])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert status == 1
    assert (found["cost"], found["drain"]) == ([], None)
    assert found["failures"] == [
        f"{name}: kv.used = 2 with nothing left to do." for name in ("0.25x", "0.5x", "0.9x", "10x")
    ]
    assert found["failures"][0] in table
