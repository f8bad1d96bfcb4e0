"""What /metrics and /status say is what was served."""

from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, live, toy_engine

from moe_lm.server import Limits


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    """A server that has had some traffic, what was asked and what was answered, and its metrics by name and labels."""
    engine = toy_engine(tokenizer, kv_memory="96KiB", adaptive=False, max_sequences=4, speculation="ngram")
    with live(engine, tmp_path_factory.mktemp("model"), Limits(max_waiting=8)) as server:
        asked = [
            {"prompt": ["the quick brown fox, 12345 times\n" * 2] * 2, "max_tokens": 40, "n": 2, "temperature": 0,
             "ignore_eos": True},
            {"prompt": "the quick brown fox, 12345 times\n" * 2, "max_tokens": 20, "temperature": 0,
             "logit_bias": {"65": 100}},
            {"prompt": "def", "max_tokens": 9, "speculation": "draft", "ignore_eos": True},
        ]  # fmt: skip
        answers = [server.complete(**each) for each in asked]
        assert server.json("/v1/completions", {"model": "another", "prompt": "a"})[0] == 404
        assert server.json("/v1/completions", {"model": NAME, "best_of": 2})[0] == 400
        server.assert_no_leak()
        text = server.request("/metrics")[2].decode()
        found = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        yield server, answers, found


def test_tokens_and_requests(served):
    _, answers, found = served
    new = sum(answer["usage"]["completion_tokens"] for answer in answers)
    read = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert found["moe_lm_generated_tokens_total",] == new
    assert found["moe_lm_prompt_tokens_total",] == read == found["moe_lm_prefix_cache_queries_total",]
    assert found["moe_lm_requests_total",] == 4
    ends = Counter({key[1][1]: value for key, value in found.items() if key[0] == "moe_lm_requests_finished_total"})
    assert ends.total() == 4
    assert set(ends) <= {"stop", "length"}
    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    assert found["moe_lm_prefix_cache_hits_total",] == cached > 0


def test_times(served):
    _, answers, found = served
    samples = sum(len(answer["choices"]) for answer in answers)
    assert found["moe_lm_time_to_first_token_seconds_count",] == samples
    # Of a sample's first step all tokens come at once, so there may be fewer gaps than tokens.
    new = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert samples < found["moe_lm_inter_token_latency_seconds_count",] <= new - samples
    assert found["moe_lm_request_seconds_count",] == 4
    assert found["moe_lm_request_seconds_sum",] > found["moe_lm_time_to_first_token_seconds_sum",] / samples > 0


def test_refusals(served):
    *_, found = served
    refused = {key[1:]: value for key, value in found.items() if key[0] == "moe_lm_requests_rejected_total"}
    assert refused == {
        (("code", "model_not_found"), ("status", "404")): 1,
        (("code", "unsupported_parameter"), ("status", "400")): 1,
    }


def test_speculation_by_kind_and_place(served):
    server, _, found = served
    for name, counts in (
        ("proposed", server.engine.stats.proposed_at), ("accepted", server.engine.stats.accepted_at),
    ):  # fmt: skip
        told = {
            (kind, place): found[f"moe_lm_speculation_{name}_total", ("kind", kind), ("position", str(place))]
            for kind, places in counts.items()
            for place in range(1, len(places) + 1)
        }
        assert told == {(kind, i): n for kind, places in counts.items() for i, n in enumerate(places, 1)}
    assert set(server.engine.stats.proposed_at) == {"ngram", "draft"}


def test_experts(served):
    server, _, found = served
    stats = server.engine.stats
    told = [value for key, value in found.items() if key[0] == "moe_lm_expert_tokens_total"]
    assert len(told) == stats.expert_tokens.size
    # Two layers, two experts for each token.
    assert sum(told) == stats.expert_tokens.sum() == 4 * stats.computed
    assert found["moe_lm_expert_tokens_total", ("expert", "3"), ("layer", "1")] == stats.expert_tokens[1, 3]


def test_cache_and_preemptions(served):
    server, _, found = served
    pool = server.engine.scheduler.pool
    assert found["moe_lm_kv_blocks",] == pool.num_blocks
    assert found["moe_lm_kv_blocks_used",] == 0
    assert found["moe_lm_kv_blocks_cached",] == pool.cached > 0
    assert found["moe_lm_preemptions_total",] == server.engine.stats.preemptions > 0
    assert found["moe_lm_requests_running",] == found["moe_lm_requests_waiting",] == 0


def test_status(served):
    server, *_ = served
    status, stats = server.status(), server.engine.stats
    assert status["model"] == NAME
    assert (status["num_hidden_layers"], status["num_experts"], status["num_experts_per_tok"]) == (2, 8, 2)
    assert (status["running"], status["waiting"], status["slots"]) == (0, 0, [])
    assert status["acceptance"] == stats.acceptance
    assert status["kv"]["blocks"] == server.engine.scheduler.pool.num_blocks
    assert 0 < status["prefix_hits"] < 1
