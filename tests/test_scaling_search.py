"""The search over layouts, with a plain stand-in for the time of a step: against trying everything, and its words."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest

from moe_lm.config import ConfigError, ModelConfig, RunConfig
from moe_lm.scaling import collectives
from moe_lm.scaling.counts import forward_flops_per_token, parameters
from moe_lm.scaling.hardware import machine
from moe_lm.scaling.layout import Layout, lay, settle
from moe_lm.scaling.memory import fullest_stage
from moe_lm.scaling.search import ROUNDING, search
from moe_lm.toml import load_config

A100 = machine("a100-80")


@dataclass
class Time:
    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Clock:
    """Seconds of a step in a few terms, each of which grows with what it stands for; counts its calls."""

    def __init__(self, model: ModelConfig, sequence_length: int):
        self.flops = forward_flops_per_token(model, (sequence_length + 1) / 2)
        self.weights = 2 * parameters(model).total
        self.calls = 0

    def __call__(self, model: ModelConfig, layout: Layout, hardware) -> Time:
        self.calls += 1
        plan, times = layout.plan, layout.micro_batches
        rate = 0.7 * hardware.sheet.peak(plan.dtype) * hardware.reached.gemm
        forward = self.flops * layout.micro_tokens / (plan.tp * plan.pp) / rate
        moved = layout.micro_tokens * model.hidden_size * 2
        layers = model.num_hidden_layers / plan.pp
        share = {"none": 0.0, "selective": 0.03, "full": 1.0}[plan.recompute]
        steps = {
            "compute": 3 * forward + 1e-4 / plan.micro_batch,
            "recompute": share * forward,
            "tensor parallelism": 8 * layers * collectives.all_gather(hardware, moved, plan.tp),
            "experts": 4 * layers * collectives.all_to_all(hardware, moved, plan.ep, plan.tp),
            "messages": 2 * plan.interleave * collectives.send(hardware, moved, plan.tp) if plan.pp > 1 else 0.0,
        }
        parts = {name: times * seconds for name, seconds in steps.items()}
        parts["bubble"] = (plan.pp - 1) / (plan.interleave * times) * sum(parts.values())
        again = {1: 1.0, 2: 1.2, 3: 1.5}[plan.zero]
        held = self.weights / (plan.tp * plan.pp)
        parts["data parallelism"] = again * collectives.all_reduce(hardware, held, layout.dp, plan.tp * plan.pp)
        return Time(parts, layout.batch_tokens)


def small_run(**changes) -> RunConfig:
    run = load_config("configs/mixtral-8x7b.toml")
    model = replace(run.model, num_hidden_layers=8, num_local_experts=4, **changes)
    return replace(run, model=model, train=replace(run.train, batch_tokens=64 * 8192))


def every_layout(run: RunConfig, gpus: int):
    """All that settle accepts on up to `gpus`, in the order of nothing in particular."""
    powers = (1, 2, 4, 8)
    for tp, pp, ep, interleave in itertools.product(powers, range(1, 9), (1, 2, 4), (1, 2, 4, 8)):
        dp = gpus // (tp * pp * ep) * ep
        for zero, micro_batch, recompute in itertools.product((1, 2, 3), powers, ("none", "selective", "full")):
            plan = replace(run.plan, tp=tp, pp=pp, ep=ep, interleave=interleave, zero=zero, micro_batch=micro_batch,
                           recompute=recompute, gpus=max(1, tp * pp * dp))  # fmt: skip
            try:
                layout = lay(run.model, plan, run.data.sequence_length, run.train.batch_tokens)
            except ConfigError:
                continue
            if abs(layout.micro_batches * micro_batch * layout.dp / 64 - 1) <= ROUNDING:
                yield layout


@pytest.mark.parametrize("memory", [24e9, 40e9, 80e9])
@pytest.mark.parametrize("gpus", [8, 13, 16])
def test_the_best_is_that_of_trying_everything(gpus, memory):
    run = small_run()
    hardware = replace(A100, sheet=replace(A100.sheet, memory=memory))
    clock = Clock(run.model, 8192)
    rates = sorted(
        (
            clock(run.model, layout, hardware).tokens_per_second
            for layout in every_layout(run, gpus)
            if fullest_stage(run.model, layout, hardware).fits
        ),
        reverse=True,
    )
    tried, clock.calls = clock.calls, 0
    if not rates:
        with pytest.raises(ConfigError, match="fits"):
            search(run, hardware, gpus, clock)
        return
    found = search(run, hardware, gpus, clock)
    assert found[0].time.tokens_per_second == pytest.approx(rates[0])
    assert clock.calls < tried or tried < 100


def test_candidates_fit_are_sorted_and_settle():
    run = small_run()
    found = search(run, A100, 16, Clock(run.model, 8192), limit=5)
    assert len(found) == 5
    rates = [candidate.time.tokens_per_second for candidate in found]
    assert rates == sorted(rates, reverse=True)
    for candidate in found:
        assert candidate.memory.fits
        assert settle(replace(run, plan=candidate.layout.plan)) == candidate.layout
        assert candidate.memory == fullest_stage(run.model, candidate.layout, A100)


def test_runners_up_say_what_they_lose():
    run = small_run()
    best, *others = search(run, A100, 16, Clock(run.model, 8192))
    assert best.loses == ""
    for other in others:
        slower, *parts = re.split(": |, ", other.loses)
        percent = 100 * (best.time.tokens_per_second / other.time.tokens_per_second - 1)
        assert slower == f"{percent:.1f}% slower"
        for part in parts:
            name, seconds = re.fullmatch(r"([\w ]+) ([+-][\d.e-]+) s", part).groups()
            expected = other.time.parts[name] - best.time.parts[name]
            assert float(seconds) == pytest.approx(expected, rel=0.01)


def test_nothing_fits():
    run = load_config("configs/gpt4-1.8t.toml")
    with pytest.raises(ConfigError) as refused:
        search(run, machine("a100-40"), 64, Clock(run.model, 8192))
    message = str(refused.value)
    assert "No layout over 64 GPUs fits. The closest is plan.tp = 8, plan.pp = 8" in message
    assert re.search(r"needs [\d.]+ GB, [\d.]+ GB more than the 42.9 GB of A100 SXM 40 GB: plan.gpus = \d+", message)


def test_rows_that_do_not_divide():
    run = small_run()
    run = replace(run, train=replace(run.train, batch_tokens=9 * 8192))
    with pytest.raises(ConfigError, match="do not divide over replicas"):
        search(replace(run, model=replace(run.model, num_attention_heads=1, num_key_value_heads=1, head_dim=128,
                                          num_hidden_layers=1)), A100, 7, Clock(run.model, 8192))  # fmt: skip


def test_25000_gpus_take_few_trials():
    run = load_config("configs/gpt4-1.8t.toml")
    clock = Clock(run.model, 8192)
    best = search(run, A100, 25000, clock)[0]
    assert clock.calls < 3000
    assert best.layout.gpus > 0.98 * 25000
