"""Hugging Face transformers as a contender: it computes our model, in the batches and settings that it should."""

import pytest
import torch
from hub_models import SMALL, random_model

from moe_lm.bench import peers
from moe_lm.bench.throughput import CannotMeasure, Timeline
from moe_lm.bench.workload import CASES, Case, Workload
from moe_lm.engine import Engine, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", SMALL)
def test_the_peer_computes_the_same_model_in_every_setting(kind):
    """Otherwise its speed would be another model's. Prompts of several lengths, the shorter ones padded."""
    model = random_model(SMALL[kind])
    peer = peers.TransformersPeer(model)
    prompts = [[5, 9, 2, 40, 7], [8, 1], [60, 61, 62]]
    params = SamplingParams(max_tokens=6, temperature=0)
    expected = [result.samples[0].tokens for result in Engine(model).generate(prompts, params)]
    settings = peer.settings()
    assert len(settings) == (2 if kind == "dense" else 6)
    for setting in settings:
        peer.run(Workload(prompts, [1] * 3), setting, 3)
        assert peer.generate(prompts, 6, setting, peers.Clock()).tolist() == expected, setting


def test_a_trace_is_served_in_static_batches(monkeypatch):
    peer = peers.TransformersPeer(random_model(SMALL["mixture"]))
    asked = []

    def generate(prompts, new, setting, clock):
        asked.append((prompts, new))
        clock(torch.tensor(len(prompts) * [[0]]), None)

    monkeypatch.setattr(peer, "generate", generate)
    served = peer.run(Workload([[1], [2, 3], [4]], [2, 5, 3]), peers.DEFAULT, 2)
    assert asked == [([[1], [2, 3]], 5), ([[4]], 3)]
    assert (served.prompt_tokens, served.tokens, served.first_tokens) == (4, 10, 8)
    asked.clear()
    found = peer.contenders(Case("trace", 32, (1, 1), (1, 1)), Workload([[1]] * 32, [1] * 32))
    assert {len(prompts) for prompts, _ in asked} == {8, 16, 32}
    assert list(found) == ["default"]


def test_the_fastest_setting_is_found_and_kept_for_the_trace(monkeypatch):
    peer = peers.TransformersPeer(random_model(SMALL["mixture"]))
    fast = peers.Setting("batched_mm", "static")
    broken = peers.Setting("eager")

    def run(work, setting, size):
        if setting == broken:
            raise RuntimeError("no such kernel\nand more")
        return Timeline(1, 0, 0.0, 1, 0.5 if setting == fast else 2.0)

    monkeypatch.setattr(peer, "run", run)
    work = Workload([[1]] * 32, [40] * 32)
    found = peer.contenders(CASES[3], work)
    assert list(found) == ["default", "batched_mm experts, static cache"]
    assert found["default"].keywords == {"setting": peers.DEFAULT, "size": 16}
    assert found["batched_mm experts, static cache"].keywords == {"setting": fast, "size": 16}
    assert peer.failures == {"eager experts": "RuntimeError: no such kernel"}
    assert str(fast) in peer.contenders(CASES[4], work)
    monkeypatch.setattr(peer, "run", lambda *_: 1 / 0)
    with pytest.raises(CannotMeasure, match="default setting: ZeroDivisionError"):
        peer.contenders(CASES[3], work)
