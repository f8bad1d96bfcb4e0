"""Phases of load: who asks for what and when, and what came of it as records, with a sentence for all that is wrong."""

import asyncio
import contextlib
import itertools
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from moe_lm.bench.client import Answer, Ask, Server
from moe_lm.bench.throughput import Record

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
OUTCOMES = ("answered", "left", "rejected", "refused", "unreachable", "failed")
MOST_REQUESTS = 3000
"""Of a phase, whatever its rate."""
IDLE_SECONDS = 20.0
"""In which a server without clients has to be empty."""
LEAVING, SLOW, WHOLE = 0.2, 0.05, 0.15
"""Shares of clients that leave, that read slowly, and that want the answer in one piece, in an overload."""
PAUSE = 0.02
"""Seconds between two events of a slow reader."""
LATE_SECONDS = 0.05
"""Between two requests to a server that ends."""
ENDING_SECONDS = 60
"""In which it has to be gone."""
DISAGREEMENT, SLACK = 1.5, 0.05
"""The client's mean latency may be so many times the server's, and so many seconds more: it sees connecting too."""
HISTOGRAMS = {
    "first": "moe_lm_time_to_first_token_seconds", "between": "moe_lm_inter_token_latency_seconds",
    "whole": "moe_lm_request_seconds",
}  # fmt: skip
"""The server's own of each latency."""


@dataclass
class Phase:
    """One phase and all its answers."""

    name: str
    rate: float | None = None
    """Requests per second that were asked; None where all came at once."""
    seconds: float = 0.0
    """From the first request to the last answer."""
    answers: list[Answer] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    """What the server's metrics grew by."""
    status: dict[str, Any] | None = None
    """The server's /status once it had nothing left to do; None where there is no server any more."""


def mixed(draw: random.Random, text: list[int], prompt: tuple[int, int], output: tuple[int, int]) -> Ask:
    """A request of drawn lengths, greedy or drawn, streamed and counted."""
    length = draw.randint(*prompt)
    start = draw.randrange(len(text) - length)
    return Ask(text[start : start + length], draw.randint(*output), greedy=draw.random() < 0.5)


def unruly(draw: random.Random, ask: Ask, usual_wait: float) -> Ask:
    """The same request from clients of which some leave early, read slowly, or want the answer in one piece.

    Who leaves does so in the queue, before the first token, which comes after about `usual_wait` seconds, or later.
    """
    kind = draw.random()
    change: dict[str, Any] = {}
    if kind < LEAVING:
        change = draw.choice((
            {"leave_after_seconds": draw.uniform(0, 0.01)},
            {"leave_after_seconds": draw.uniform(0, 2 * usual_wait)},
            {"leave_after_tokens": draw.randint(1, max(1, ask.max_tokens - 1))},
        ))  # fmt: skip
    elif kind < LEAVING + SLOW:
        change = {"pause": PAUSE}
    elif kind < LEAVING + SLOW + WHOLE:
        change = {"stream": False}
    return Ask(ask.prompt, ask.max_tokens, ask.greedy, **change)


async def arrive(server: Server, asks: Iterable[Ask], rate: float, seconds: float, draw: random.Random) -> list[Answer]:
    """Requests at random moments, `rate` of them per second (Poisson), whether or not the server keeps up."""
    begin, due = time.perf_counter(), 0.0
    tasks: list[asyncio.Task[Answer]] = []
    for ask in itertools.islice(asks, MOST_REQUESTS):
        due += draw.expovariate(rate)
        if due > seconds and tasks:
            break
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        tasks.append(asyncio.create_task(server.ask(ask)))
    return list(await asyncio.gather(*tasks))


async def at_once(server: Server, asks: list[Ask]) -> list[Answer]:
    return list(await asyncio.gather(*map(server.ask, asks)))


async def measured(server: Server, phase: Phase, work: Awaitable[list[Answer]]) -> Phase:
    """Run a phase's work between two looks at the server's metrics, the second once the server is empty."""
    before = await scrape(server)
    begin = time.perf_counter()
    phase.answers = await work
    phase.seconds = max(answer.ended for answer in phase.answers) - begin
    end = time.perf_counter() + IDLE_SECONDS
    while True:
        phase.status = await server.json("/status")
        phase.counted = {name: value - before.get(name, 0.0) for name, value in (await scrape(server)).items()}
        if not leaks(phase) or time.perf_counter() > end:
            return phase
        await asyncio.sleep(0.02)


def leaks(phase: Phase) -> list[str]:
    """What should not be once a server has nothing left to do."""
    status = phase.status
    shown = {"running": status["running"], "waiting": status["waiting"], "kv.used": status["kv"]["used"]}
    found = [f"{name} = {count} with nothing left to do" for name, count in shown.items() if count]
    accepted, ended = (total(phase.counted, f"moe_lm_requests_{name}total") for name in ("", "finished_"))
    if accepted != ended:
        found.append(f"the server counts {accepted:g} requests accepted, but {ended:g} ended")
    return found


async def scrape(server: Server) -> dict[str, float]:
    """The samples of /metrics by name with labels."""
    text = (await server.get("/metrics"))[1].decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def total(counted: dict[str, float], name: str) -> float:
    """A counter's value, over all its labels."""
    return sum(value for key, value in counted.items() if key.partition("{")[0] == name)


def figures(values: list[float]) -> dict[str, float] | None:
    """Quantiles and mean; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    places = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in QUANTILES.items()}
    return places | {"mean": statistics.fmean(values)}


def histogram(counted: dict[str, float], name: str) -> dict[str, float] | None:
    """The same of a histogram of the server's, as Prometheus' histogram_quantile has it: linear within a bucket."""
    count = counted.get(f"{name}_count")
    if not count:
        return None
    found = (re.fullmatch(rf'{name}_bucket{{le="(.+)"}}', key) for key in counted)
    buckets = sorted((float(match[1]), counted[match[0]]) for match in found if match)
    places = {}
    for label, share in QUANTILES.items():
        low, below = 0.0, 0.0
        for high, most in buckets:
            if most >= share * count:
                inside = (share * count - below) / (most - below) if most > below else 1.0
                places[label] = low if high == float("inf") else low + (high - low) * inside
                break
            low, below = high, most
    return places | {"mean": counted[f"{name}_sum"] / count}


def latencies(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Seconds to the first token, between tokens (those of one event share its time), and to the end."""
    found: dict[str, list[float]] = {"first": [], "between": [], "whole": []}
    for answer in answers:
        found["whole"].append(answer.ended - answer.sent)
        if not answer.ask.stream or not answer.tokens:
            continue
        found["first"].append(answer.tokens[0][0] - answer.sent)
        if answer.ask.counted:
            for (earlier, _), (later, count) in itertools.pairwise(answer.tokens):
                found["between"] += [(later - earlier) / count] * count
    return found


def outcomes(phase: Phase) -> Record:
    """How many requests were sent, and how they ended."""
    found = Counter(answer.outcome for answer in phase.answers)
    return {"sent": len(phase.answers)} | {outcome: found[outcome] for outcome in OUTCOMES}


def record(phase: Phase) -> Record:
    """A phase as it goes into the JSON."""
    answered = [answer for answer in phase.answers if answer.outcome == "answered"]
    seen = latencies(answer for answer in answered if answer.ask.usual)
    return {
        "name": phase.name, "rate": phase.rate, "seconds": phase.seconds, **outcomes(phase),
        "requests_per_s": len(answered) / phase.seconds,
        "tokens_per_s": sum(answer.usage or answer.counted for answer in phase.answers) / phase.seconds,
        **{name: figures(values) for name, values in seen.items()},
        "server": {name: histogram(phase.counted, metric) for name, metric in HISTOGRAMS.items()},
    }  # fmt: skip


def complaints(phase: Phase) -> list[str]:
    """A sentence for each thing that must not be."""
    found = list(itertools.chain.from_iterable(map(wrong, phase.answers)))
    # One example of each kind says it.
    kinds: dict[str, list[str]] = {}
    for sentence in found:
        kinds.setdefault(re.sub(r"\d+", "", sentence), []).append(sentence)
    said = [f"{each[0]} ({len(each)} of {len(phase.answers)} requests)" for each in kinds.values()]
    if phase.status is not None:
        said += leaks(phase)
    return [f"{phase.name}: {sentence}." for sentence in said]


def wrong(answer: Answer) -> Iterable[str]:
    """What is wrong with one answer."""
    ask, outcome = answer.ask, answer.outcome
    if outcome == "failed":
        yield f"a request failed with status {answer.status}: {answer.error or 'its answer has no end'}"
    elif outcome in ("rejected", "refused") and not answer.retry_after:
        yield f"status {answer.status} came without Retry-After"
    elif outcome == "answered":
        if answer.usage is None:
            yield "an answer has no usage"
        elif ask.counted and answer.usage != answer.counted:
            yield f"usage says {answer.usage} tokens, and {answer.counted} came"
        elif answer.usage > ask.max_tokens or (answer.usage < ask.max_tokens and answer.finish_reason == "length"):
            yield f"{answer.usage} tokens came of {ask.max_tokens} with finish_reason {answer.finish_reason}"
        if answer.finish_reason not in (("length",) if ask.greedy else ("length", "stop")):
            yield f"a request ended with finish_reason {answer.finish_reason}"


def disagreements(phase: Record) -> list[str]:
    """Where a phase's latencies are not those that the server says; for phases of ordinary clients."""
    found = []
    for name in HISTOGRAMS:
        ours, theirs = phase[name], phase["server"][name]
        if ours and (not theirs or ours["mean"] > DISAGREEMENT * theirs["mean"] + SLACK
                     or theirs["mean"] > DISAGREEMENT * ours["mean"] + SLACK):  # fmt: skip
            told = f"{theirs['mean']:.4f} s" if theirs else "nothing"
            mean = f"{ours['mean']:.4f} s"
            found.append(f"{phase['name']}: mean latency ({name}) is {mean} here, and {told} in /metrics.")
    return found


async def drained(server: Server, asks: list[Ask], late: Ask, terminate: Callable[[], None]) -> tuple[Phase, Phase]:
    """Have the server end while it serves `asks`, and go on asking until nobody listens: those in flight, and the late.

    `terminate` sends the signal.
    """
    flying, begin = Phase("in flight at the end"), time.perf_counter()
    tasks = [asyncio.create_task(server.ask(ask)) for ask in asks]
    while not all(task.done() for task in tasks):
        status = await server.json("/status")
        if status["running"] + status["waiting"] >= sum(not task.done() for task in tasks):
            break
        await asyncio.sleep(0.005)
    terminate()
    later = Phase("late")
    with contextlib.suppress(OSError, EOFError):
        while (await server.get("/health"))[0] == 200:
            await asyncio.sleep(0.005)
        later_begin = time.perf_counter()
        while time.perf_counter() < later_begin + ENDING_SECONDS:
            later.answers.append(await server.ask(late))
            if later.answers[-1].status is None:
                break  # nobody listens, or the connection was not taken any more
            await asyncio.sleep(LATE_SECONDS)
        later.seconds = time.perf_counter() - later_begin
    flying.answers = list(await asyncio.gather(*tasks))
    flying.seconds = max(answer.ended for answer in flying.answers) - begin
    return flying, later


def drain_complaints(flying: Phase, later: Phase, exit_status: int) -> list[str]:
    """A sentence for each thing that must not be when a server ends."""
    found = []
    cut = [answer for answer in flying.answers if answer.outcome == "failed" and answer.done]
    left = Phase(flying.name, answers=[answer for answer in flying.answers if answer not in cut])
    found += complaints(left)
    told = [answer for answer in later.answers if answer.status is not None]
    refused = [answer for answer in told if answer.outcome == "refused"]
    if len(refused) < len(told):
        taken = len(told) - len(refused)
        found.append(f"{taken} of {len(later.answers)} requests that came after SIGTERM were not refused.")
    if not refused:
        found.append("no request could be tried after SIGTERM: those in flight had ended, or the server had.")
    found += complaints(Phase(later.name, answers=refused))
    if exit_status != 0:
        found.append(f"the server ended with exit status {exit_status} after SIGTERM.")
    return found
