"""Contenders serve the same requests turn by turn, and what came of it as records."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moe_lm.bench.workload import Case, Workload
from moe_lm.engine import Engine, SamplingParams, Stats

Record = dict[str, Any]
"""One line of the benchmark, as it goes into the JSON."""


class CannotMeasure(Exception):
    """A contender that cannot do a case; the message is a sentence."""


class Timeline(NamedTuple):
    """How one workload was served, from its arrival."""

    prompt_tokens: int
    first_tokens: int
    """New tokens at the moment when every request had one."""
    first_seconds: float
    """That moment."""
    tokens: int
    """New tokens in the end."""
    seconds: float
    """The end."""

    def rate(self, name: str) -> float:
        """Tokens per second, of what the case of this name counts."""
        if name == "prefill":
            return self.prompt_tokens / self.first_seconds
        if name == "decode":
            return (self.tokens - self.first_tokens) / (self.seconds - self.first_seconds)
        return self.tokens / self.seconds


Contender = Callable[[Workload], Timeline]


class EngineContender:
    """Our engine with one way of speculation."""

    def __init__(self, engine: Engine, speculation: str):
        self.engine, self.speculation = engine, speculation
        self.stats: list[Stats] = []
        """Of each workload, from the moment when every request had a token."""

    def __call__(self, work: Workload) -> Timeline:
        """Serve all requests. Raises CannotMeasure where one of them fails."""
        engine = self.engine
        start = time.perf_counter()
        wanted = {
            engine.add(prompt, SamplingParams(n, temperature=0, ignore_eos=True, speculation=self.speculation)): n
            for prompt, n in zip(work.prompts, work.outputs, strict=True)
        }
        served = dict.fromkeys(wanted, 0)
        without, first_tokens, first_seconds = set(wanted), 0, 0.0
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason == "error":
                    self.abandon(wanted)
                    raise CannotMeasure(f"a request failed: {output.error}")
                served[output.request_id] += len(output.tokens)
                if output.tokens:
                    without.discard(output.request_id)
            if not without and not first_seconds:
                first_tokens, first_seconds = sum(served.values()), time.perf_counter() - start
                engine.reset_stats()
        seconds = time.perf_counter() - start
        assert served == wanted, "a request got more or fewer tokens than it asked for"
        self.stats.append(engine.stats)
        engine.reset_stats()  # what was kept counts no further
        return Timeline(sum(map(len, work.prompts)), first_tokens, first_seconds, work.tokens, seconds)

    def abandon(self, requests: Iterable[str]) -> None:
        """End what is left of the requests, so that the next workload has the engine for itself."""
        for request in requests:
            self.engine.abort(request)
        while self.engine.has_work:
            self.engine.step()


def alternate(
    case: Case, runs: dict[str, Callable[[Workload], Any]], text: list[int], turns: int
) -> dict[str, list[Any]]:  # fmt: skip
    """What every run returned in every turn, given that turn's requests; the order is reversed from turn to turn."""
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(turns):
        work = case.workload(text, turn)
        for name in list(runs) if turn % 2 == 0 else reversed(runs):
            found[name].append(runs[name](work))
    return found


def ratio(rates: list[float], others: list[float]) -> float:
    """Median over turns of one rate as a multiple of another of the same turn."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates, others, strict=True))


def spread(rates: list[float]) -> tuple[float, float]:
    """How far the quartiles lie from the median, as shares of it; 0 for a single turn."""
    if len(rates) < 2:
        return 0.0, 0.0
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return low / median - 1, high / median - 1


def distinct_experts(stats: Iterable[Stats], layers: int) -> float:
    """Distinct experts of a routing layer that a step read, on average; 0 where there are no such `layers`."""
    counted = list(stats)
    return sum(each.experts for each in counted) / (max(1, layers) * sum(each.steps for each in counted))


def phase_shares(stats: Iterable[Stats]) -> dict[str, float]:
    """Share of the steps' time by phase."""
    totals: dict[str, float] = {}
    for each in stats:
        for phase, seconds in each.seconds.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    whole = sum(totals.values())
    return {phase: seconds / whole for phase, seconds in totals.items()}


def speculation_facts(stats: Iterable[Stats]) -> Record:
    """Share of the drafted tokens that stood, and tokens that a sequence got from a step."""
    counted = list(stats)
    proposed, accepted, decoded, decodes = (
        sum(getattr(each, name) for each in counted) for name in ("proposed", "accepted", "decoded", "decodes")
    )
    return {
        "acceptance": accepted / proposed if proposed else None,
        "tokens_per_step": decoded / decodes if decodes else None,
    }


def record(case: Case, shape: str, speculation: str, rates: list[float], limits: list[float]) -> Record:
    """A line without what only some lines have: peer, phases, facts of speculation."""
    return {
        "name": case.name if speculation == "none" else f"{case.name}, {speculation}",
        "shape": shape, "batch": case.batch, "tokens_per_s": statistics.median(rates),
        "limit": statistics.median(limits), "fraction": ratio(rates, limits),
        "peer": None, "ratio": None, "spread": spread(rates), "turns": len(rates), "speculation": speculation,
    }  # fmt: skip


def with_peer(line: Record, ours: list[float], peer: dict[str, list[float]]) -> Record:
    """The line beside a peer's settings, `default` among them: `peer` and `ratio` are those of the fastest."""
    fastest = max(peer, key=lambda setting: statistics.median(peer[setting]))
    return line | {
        "peer": statistics.median(peer[fastest]), "ratio": ratio(ours, peer[fastest]), "peer_setting": fastest,
        "peer_default": statistics.median(peer["default"]), "ratio_to_default": ratio(ours, peer["default"]),
    }  # fmt: skip
