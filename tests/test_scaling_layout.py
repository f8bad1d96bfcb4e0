"""How layers are shared out among pipeline stages, and which sizes are refused."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lm.config import ConfigError, Mamba, ModelConfig, RunConfig, TrainingPlan
from moe_lm.scaling.counts import layer_parameters
from moe_lm.scaling.layout import lay, settle, split, stages
from moe_lm.toml import load_config

GPT4 = load_config("configs/gpt4-1.8t.toml").model


def sizes(model, pp, interleave=1):
    return [len(stage.layers) for stage in stages(model, pp, interleave)]


def test_reported_layouts():
    assert sizes(GPT4, 15) == [8] * 15
    assert sizes(GPT4, 16) == [7] * 7 + [8] * 8 + [7]  # F31: fewer layers at the head, and beside the output
    assert sizes(GPT4, 1) == [120]
    assert sizes(GPT4, 120) == [1] * 120


def test_dealt_chunks():
    dealt = stages(GPT4, 15, 2)
    assert dealt[0].layers == (*range(4), *range(60, 64))
    assert sizes(GPT4, 15, 2) == [8] * 15
    assert sizes(GPT4, 16, 2) == [7] * 7 + [8] * 8 + [7]
    for stage_list in (dealt, stages(GPT4, 16, 2)):
        assert sorted(layer for stage in stage_list for layer in stage.layers) == list(range(120))
    assert [stage.embedding for stage in dealt] == [True] + [False] * 14
    assert [stage.output for stage in dealt] == [False] * 14 + [True]


def heaviest(weights, bounds, first, last):
    runs = [sum(weights[a:b]) for a, b in itertools.pairwise(bounds)]
    runs[0] += first
    runs[-1] += last
    return max(runs)


@given(st.data())
def test_the_heaviest_run_is_as_light_as_can_be(data):
    weights = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    parts = data.draw(st.integers(1, len(weights)))
    first, last = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    bounds = split(weights, parts, first, last)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), parts + 1)
    assert all(a < b for a, b in itertools.pairwise(bounds))
    every = ([0, *cuts, len(weights)] for cuts in itertools.combinations(range(1, len(weights)), parts - 1))
    assert heaviest(weights, bounds, first, last) == min(heaviest(weights, cuts, first, last) for cuts in every)


@given(st.integers(1, 130), st.data())
def test_equal_layers_are_spread_evenly_and_the_head_is_light(layers, data):
    parts = data.draw(st.integers(1, layers))
    runs = [b - a for a, b in itertools.pairwise(split([10] * layers, parts, first=1, last=1))]
    assert max(runs) - min(runs) <= 1
    assert runs[:-1] == sorted(runs[:-1])


def test_unequal_layers():
    mixed = replace(GPT4, mamba=Mamba(), expert_layer_period=2, expert_layer_offset=1)
    chosen = stages(mixed, 8)
    held = [sum(layer_parameters(mixed, layer).total for layer in stage.layers) for stage in chosen]
    assert max(held) <= 1.1 * sum(held) / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 100}, "plan.gpus = 100 is not a multiple of plan.tp x plan.pp = 8 x 15 = 120"),
        ({"ep": 3}, "plan.ep = 3 does not divide the replicas"),
        ({"tp": 7, "gpus": 105}, "plan.tp = 7 does not divide model.num_attention_heads = 120"),
        ({"pp": 121, "gpus": 968}, "more than model.num_hidden_layers = 120"),
        ({"pp": 1, "gpus": 8, "interleave": 2}, "plan.interleave = 2 needs a pipeline"),
        ({"zero_group": 7}, "plan.zero_group = 7 does not divide the replicas, 208"),
        ({"micro_batch": 64}, "fewer than one micro-batch"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, message):
    run = load_config("configs/gpt4-1.8t.toml")
    with pytest.raises(ConfigError, match=message):
        settle(replace(run, plan=replace(run.plan, **changes)))


def test_a_settled_plan():
    layout = settle(load_config("configs/gpt4-1.8t.toml"))
    assert (layout.gpus, layout.dp, layout.micro_batches, layout.micro_tokens) == (24960, 208, 35, 8192)
    assert layout.zero_group == 208
    assert settle(RunConfig()).gpus == 1


def test_ranks_share_the_channels_of_mamba():
    model = ModelConfig(hidden_size=84, intermediate_size=96, num_attention_heads=16, num_key_value_heads=16,
                        head_dim=8, num_local_experts=0, mamba=Mamba(expand=1))  # fmt: skip
    with pytest.raises(ConfigError, match=r"plan.tp = 8 does not divide model.hidden_size x mamba.expand = 84"):
        lay(model, TrainingPlan(tp=8), 256, 8192)


def test_chunks_beyond_the_layers_are_refused():
    with pytest.raises(ConfigError, match="16 stages of 8 chunks cannot share 120 layers"):
        stages(GPT4, 16, 8)
