"""What the server counts, in the format of Prometheus. Every name begins with moe_lm_."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe_lm.engine import Snapshot, Stats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds of the histograms' buckets."""


class Metrics:
    """The counters of one server."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.first = Histogram(
            "moe_lm_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "moe_lm_inter_token_latency_seconds", "Between two tokens of a sample; those of one step share its time.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.whole = Histogram(
            "moe_lm_request_seconds", "From a request's arrival to its end.", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("moe_lm_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.new_tokens = Counter("moe_lm_generated_tokens", "New tokens.", registry=registry)
        self.requests = Counter("moe_lm_requests", "Accepted requests, one for each prompt.", registry=registry)
        self.finished = Counter(
            "moe_lm_requests_finished", "Requests that ended, by reason.", ["reason"], registry=registry
        )
        self.rejected = Counter(
            "moe_lm_requests_rejected", "Requests refused, by HTTP status and code.", ["status", "code"],
            registry=registry,
        )  # fmt: skip

    def accepted(self, tokens: int) -> None:
        self.requests.inc()
        self.prompt_tokens.inc(tokens)

    def came(self, tokens: int, since_arrival: float, since_last: float | None) -> None:
        """A sample got tokens; `since_last` is None for its first."""
        self.new_tokens.inc(tokens)
        if since_last is None:
            self.first.observe(since_arrival)
        else:
            for _ in range(tokens):
                self.between.observe(since_last / tokens)

    def ended(self, reason: str, seconds: float) -> None:
        self.finished.labels(reason).inc()
        self.whole.observe(seconds)

    def refused(self, status: int, code: str | None) -> None:
        self.rejected.labels(str(status), code or "").inc()

    def render(self, engine: list[Metric]) -> bytes:
        """The text that Prometheus scrapes, given what `engine_metrics` found."""
        return generate_latest(self.registry) + generate_latest(Families(engine))


class Families(list):
    """Finished metrics, as prometheus-client writes them."""

    def collect(self) -> Iterator[Metric]:
        return iter(self)


def engine_metrics(snapshot: Snapshot, stats: Stats) -> Iterator[Metric]:
    """What an engine says of itself at one moment."""
    yield gauge("requests_running", "Samples that hold cache blocks.", snapshot.running)
    yield gauge("requests_waiting", "Samples that wait for blocks or a place.", snapshot.waiting)
    yield gauge("kv_blocks", "Blocks of the cache.", snapshot.blocks)
    yield gauge("kv_blocks_used", "Blocks that running samples hold.", snapshot.used)
    yield gauge("kv_blocks_cached", "Free blocks that a prompt could still find.", snapshot.cached)
    yield counter("engine_steps", "Steps of the engine.", stats.steps)
    yield counter("preemptions", "Times that a sample lost its blocks.", stats.preemptions)
    yield counter("prefix_cache_queries", "Tokens of prompts that started.", stats.prompt_tokens)
    yield counter("prefix_cache_hits", "Those of them that were found in the cache.", stats.cached_tokens)
    for name, help_, counts in (
        ("speculation_proposed", "Guessed tokens, by way of speculation and place in the guess.", stats.proposed_at),
        ("speculation_accepted", "Those of them that stood.", stats.accepted_at),
    ):
        family = CounterMetricFamily(f"moe_lm_{name}", help_, labels=["kind", "position"])
        for kind, places in counts.items():
            for place, count in enumerate(places, 1):
                family.add_metric([kind, str(place)], count)
        yield family
    experts = CounterMetricFamily("moe_lm_expert_tokens", "Tokens that experts got.", labels=["layer", "expert"])
    if stats.expert_tokens is not None:
        for layer, counts in enumerate(stats.expert_tokens.tolist()):
            for expert, count in enumerate(counts):
                experts.add_metric([str(layer), str(expert)], count)
    yield experts


def gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moe_lm_{name}", help_, value=value)


def counter(name: str, help_: str, value: float) -> Metric:
    return CounterMetricFamily(f"moe_lm_{name}", help_, value=value)
