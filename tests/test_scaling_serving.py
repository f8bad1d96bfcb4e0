"""The serving model: cases by hand, limits, what must only grow, and published rates."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.config import ConfigError, LatentAttention, Mamba, ModelConfig, ServingPlan
from moe_lm.scaling.constants import CALLS, ENGINES, READS, SERVING_SPREAD, Engine
from moe_lm.scaling.counts import forward_flops_per_token
from moe_lm.scaling.frontier import frontier, layouts, sweep
from moe_lm.scaling.hardware import KEPT, Hardware, Machine, PeakFlops, machine
from moe_lm.scaling.routing import expected_distinct
from moe_lm.scaling.serving import decode_rate, decode_step, expected_tokens, forecast, prefill, serve
from moe_lm.scaling.serving_choices import (
    bits_rows,
    flops_per_weight_byte,
    head_rows,
    readable_parameters,
    ridge,
)
from moe_lm.scaling.speculation import break_even, speculation_rows

DENSE = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, num_local_experts=0, max_position_embeddings=4096,
)  # fmt: skip
MIXTRAL = replace(
    DENSE, intermediate_size=14336, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2
)  # fmt: skip
MQA = replace(DENSE, num_key_value_heads=1)
PLAN = ServingPlan(gpu="a100-80", batch=1)
NO_ENGINE = Engine(step=0.0, message=0.0)


def ideal(name: str = "a100-80") -> Machine:
    """A machine whose kernels of decode reach all of its sheet and start at once."""
    real = machine(name)
    reads = 1 / READS[real.sheet.family]
    return replace(real, reached=real.reached._replace(gemm=1.0, bandwidth=reads, attention=1.0, launch=0.0, links=1.0))


def cpu() -> Machine:
    sheet = Hardware(
        name="a laptop", family="cpu", memory=16 * 10**9, bandwidth=2e10, units=2, l2_bytes=2**21,
        peak_flops=PeakFlops(float32=1e11, bfloat16=6e11), gpus_per_node=1, nvlink=0.0, network=0.0,
        nvlink_latency=0.0, network_latency=0.0, price=0.1, power=50.0,
    )  # fmt: skip
    return Machine(sheet, machine("a100-80").reached._replace(gemm=1.0, bandwidth=1.0))


def test_one_sequence_reads_every_weight_and_its_cache_once():
    step = decode_step(DENSE, PLAN, ideal(), batch=1, context=1000, engine=NO_ENGINE)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096)
    cache = 2 * 32 * 2 * 4096 * 1001
    assert step.weight_bytes == weights
    assert step.cache_bytes == cache
    assert step.bound == "memory"
    assert step.seconds == pytest.approx((weights + cache) / 2.039e12, rel=0.01)
    assert step.flops == pytest.approx(forward_flops_per_token(DENSE, 1001))
    assert math.fsum(step.parts.values()) == pytest.approx(step.seconds)


def test_a_huge_batch_computes_all_the_time():
    step = decode_step(DENSE, PLAN, ideal(), batch=27648, context=1, engine=NO_ENGINE)
    assert step.bound == "compute"
    assert step.flops / step.seconds / 312e12 == pytest.approx(1, abs=0.15)


def test_a_long_prompt_computes_all_the_time():
    step = prefill(DENSE, PLAN, ideal(), tokens=4096, engine=NO_ENGINE)
    assert step.bound == "compute"
    assert 0.8 < step.flops / step.seconds / 312e12 <= 1
    output = prefill(replace(DENSE, vocab_size=64000), PLAN, ideal(), tokens=4096, engine=NO_ENGINE)
    assert output.seconds - step.seconds < 3 * 2 * 32000 * 4096 / 2.039e12  # logits of the last token alone


def test_experts_that_are_read():
    dense = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 8 * 4096) + 32000 * 4096
    for batch in (1, 3, 16):
        step = decode_step(MIXTRAL, PLAN, ideal(), batch=batch, context=10)
        experts = 32 * 3 * 4096 * 14336 * expected_distinct(8, 2, batch)
        assert step.weight_bytes == pytest.approx(2 * (dense + experts))
    verify = decode_step(MIXTRAL, PLAN, ideal(), batch=2, context=10, new_tokens=3)
    again = 32 * 3 * 4096 * 14336 * expected_distinct(8, 2, 6)
    assert verify.weight_bytes == pytest.approx(2 * (dense + again))
    assert verify.tokens == 6


def test_one_head_is_whole_on_every_rank():
    caches = {
        (model.num_key_value_heads, tp): decode_step(
            model, replace(PLAN, tp=tp), ideal(), batch=4, context=999
        ).cache_bytes
        for model in (MQA, DENSE)
        for tp in (1, 8)
    }
    assert caches[1, 1] == caches[1, 8] == 4 * 1000 * 32 * 2 * 128 * 2
    assert caches[32, 8] == caches[32, 1] / 8
    assert caches[32, 1] == 32 * caches[1, 1]


def test_latent_attention_reads_one_latent_on_every_rank():
    mla = LatentAttention(
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536
    )  # fmt: skip
    model = replace(DENSE, mla=mla)
    for tp in (1, 8):
        step = decode_step(model, replace(PLAN, tp=tp), ideal(), batch=2, context=99)
        assert step.cache_bytes == 2 * 100 * 32 * 576 * 2
    short = decode_step(model, PLAN, ideal(), batch=2, context=99)
    a_layer = 4096 * 1536 + 1536 * 32 * 192 + 4096 * 576 + 512 * 32 * 256 + 32 * 128 * 4096
    assert short.weight_bytes == 2 * (32 * (a_layer + 3 * 4096 * 11008) + 32000 * 4096)


def test_a_state_does_not_grow():
    model = replace(DENSE, mamba=Mamba(attn_layer_period=32, attn_layer_offset=4, d_state=16, d_conv=4))
    one, two = (decode_step(model, PLAN, ideal(), batch=8, context=c) for c in (999, 1999))
    states = 8 * 31 * 8192 * (16 * 4 + 4 * 2)
    assert one.cache_bytes == states + 8 * 1000 * 2 * 4096 * 2
    assert two.cache_bytes - one.cache_bytes == 8 * 1000 * 2 * 4096 * 2


def test_stages_work_at_the_same_time():
    whole = decode_step(DENSE, PLAN, machine("a100-80"), batch=4, context=500, engine=NO_ENGINE)
    plan = replace(PLAN, pp=4)
    split = decode_step(DENSE, plan, machine("a100-80"), batch=16, context=500, engine=NO_ENGINE)
    assert math.fsum(split.parts.values()) == pytest.approx(split.seconds)
    assert split.seconds == pytest.approx(whole.seconds, rel=0.08)  # each micro-batch passes the same layers
    assert split.tokens_per_s == pytest.approx(4 * whole.tokens_per_s, rel=0.08)
    assert split.weight_bytes == pytest.approx(whole.weight_bytes)  # a quarter of the weights, four times a round
    lonely = decode_step(DENSE, plan, machine("a100-80"), batch=1, context=500, engine=NO_ENGINE)
    assert lonely.weight_bytes == pytest.approx(whole.weight_bytes / 4)
    assert lonely.seconds > 0.9 * decode_step(DENSE, PLAN, machine("a100-80"), batch=1, context=500).seconds


def test_the_slowest_stage_sets_the_pace():
    model = replace(DENSE, num_hidden_layers=3, vocab_size=128)
    step = decode_step(model, replace(PLAN, pp=2), ideal(), batch=2, context=10, engine=NO_ENGINE)
    single = decode_step(model, PLAN, ideal(), batch=1, context=10, engine=NO_ENGINE)
    assert step.seconds == pytest.approx(2 * 2 / 3 * single.seconds, rel=0.05)  # two rounds of two of the three layers


def test_expert_parallel_ranks_share_experts_and_have_their_own_requests():
    one = decode_step(MIXTRAL, PLAN, ideal(), batch=64, context=100, engine=NO_ENGINE)
    plan = replace(PLAN, ep=8)
    eight = decode_step(MIXTRAL, plan, ideal(), batch=64, context=100, engine=NO_ENGINE)
    assert eight.cache_bytes == pytest.approx(one.cache_bytes / 8)
    assert one.weight_bytes / 8 < eight.weight_bytes < one.weight_bytes / 4
    assert eight.parts["all-to-all"] > 0
    idle = decode_step(MIXTRAL, plan, ideal(), batch=1, context=100, engine=NO_ENGINE)
    assert 2 * 32 * 3 * 4096 * 14336 * 0.25 < idle.parts["experts"] * 2.039e12 < 2 * 32 * 3 * 4096 * 14336 * 1.2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([DENSE, MIXTRAL, MQA]), st.sampled_from([(1, 1, 1), (8, 1, 1), (2, 4, 1)]), st.integers(1, 3000),
    st.integers(1, 4000), st.integers(1, 300),
)  # fmt: skip
def test_more_work_takes_longer(model, sizes, batch, context, more):
    tp, pp, ep = sizes
    plan, real = ServingPlan(tp=tp, pp=pp, ep=ep), machine("h100")

    def seconds(**changes) -> float:
        arguments = {"batch": batch, "context": context, "new_tokens": 1} | changes
        return decode_step(model, plan, real, **arguments).seconds * (1 + 1e-9)

    assert seconds(batch=batch + more) >= seconds() / (1 + 1e-9)
    assert seconds(context=context + more) >= seconds() / (1 + 1e-9)
    assert seconds(new_tokens=1 + more) >= seconds() / (1 + 1e-9)


def test_narrow_weights_are_widened():
    real = machine("a100-80")
    wide = decode_step(DENSE, PLAN, real, batch=1, context=10)
    eight = decode_step(DENSE, replace(PLAN, weight_bits=8), real, batch=1, context=10)
    assert eight.weight_bytes == pytest.approx(wide.weight_bytes / 2 + 32000 * 4096)  # the output keeps its 16 bits
    assert wide.seconds / 2 < eight.seconds < wide.seconds
    h100 = machine("h100")
    narrow = replace(PLAN, weight_bits=8)
    direct = decode_step(DENSE, replace(narrow, dtype="float8"), h100, batch=1, context=10)
    assert direct.seconds < decode_step(DENSE, narrow, h100, batch=1, context=10).seconds
    with pytest.raises(ConfigError, match="dtype = float8 is not multiplied by A100"):
        decode_step(DENSE, replace(narrow, dtype="float8"), real, batch=1, context=10)


def test_an_engine_without_grouped_reads_pays_for_every_head():
    model = replace(DENSE, num_key_value_heads=8)
    shared, apart = (
        decode_step(model, PLAN, ideal(), batch=64, context=2000, engine=engine)
        for engine in (NO_ENGINE, NO_ENGINE._replace(grouped=False))
    )
    heads = decode_step(DENSE, PLAN, ideal(), batch=64, context=2000, engine=NO_ENGINE)
    assert apart.parts["attention"] == pytest.approx(heads.parts["attention"], rel=1e-6)
    assert apart.parts["attention"] == pytest.approx(4 * shared.parts["attention"], rel=0.05)


def test_sizes_that_do_not_divide_are_refused():
    real = machine("a100-80")
    for plan, message in [
        (replace(PLAN, tp=3), "serving.tp = 3 does not divide model.num_attention_heads = 32"),
        (replace(PLAN, ep=3), "serving.ep = 3 does not divide model.num_local_experts = 8"),
        (replace(PLAN, pp=33), "serving.pp = 33 is more than model.num_hidden_layers = 32"),
    ]:
        with pytest.raises(ConfigError, match=message):
            decode_step(MIXTRAL, plan, real, batch=1, context=1)


@pytest.mark.parametrize(
    ("model", "tp", "engine", "measured"),
    [(DENSE, 1, "gpt-fast", 104.9), (DENSE, 8, "gpt-fast", 328.43), (MIXTRAL, 8, "gpt-fast", 203.69)],
)
def test_published_rates(model, tp, engine, measured):
    """Pytorch-labs/gpt-fast, README.md and mixtral-moe/README.md: batch 1, about 100 tokens of context."""
    rate = decode_rate(model, replace(PLAN, tp=tp), machine("a100-80"), batch=1, context=105, engine=ENGINES[engine])
    assert rate == pytest.approx(measured, rel=0.25)


def test_a_cpu_has_no_tiles_and_needs_no_links():
    nano = ModelConfig()
    plan = ServingPlan(gpu="cpu")
    slow = decode_step(nano, plan, cpu(), batch=1, context=100, engine=NO_ENGINE)
    assert 0 < slow.seconds < 0.01
    assert slow.flops == pytest.approx(forward_flops_per_token(nano, 101))
    computing = replace(cpu(), sheet=replace(cpu().sheet, bandwidth=1e15))
    computing = replace(computing, reached=computing.reached._replace(launch=0.0, attention=1.0))
    step = decode_step(nano, plan, computing, batch=1, context=100, engine=NO_ENGINE)
    assert step.seconds == pytest.approx(step.flops / 6e11, rel=0.01)


def test_a_core_reads_and_then_multiplies():
    """Of the products of 8 rows, by hand; a GPU does both at once."""
    real = replace(cpu(), reached=cpu().reached._replace(launch=0.0))
    dense = replace(DENSE, num_hidden_layers=1)
    parts = decode_step(dense, ServingPlan(gpu="cpu"), real, batch=8, context=1, engine=NO_ENGINE).parts
    weights = 4096 * 32000
    assert parts["output"] == pytest.approx(2 * weights / 2e10 + 16 * weights / 6e11, rel=0.01)


def test_what_one_step_reads_is_in_the_cache_of_the_next():
    """All of a small model; of many experts those that a step takes, not those that it leaves."""
    model = ModelConfig(num_local_experts=16, num_experts_per_tok=2)
    nbytes = decode_step(model, ServingPlan(gpu="cpu"), cpu(), batch=1, context=1, engine=NO_ENGINE).weight_bytes
    large = replace(cpu(), sheet=replace(cpu().sheet, l2_bytes=math.ceil(nbytes / KEPT), bandwidth=2e8))
    kept = replace(large, reached=large.reached._replace(cached=5.0))
    fast = replace(large, sheet=replace(large.sheet, bandwidth=1e9))
    step, without, five_times = (
        decode_step(model, ServingPlan(gpu="cpu"), here, batch=1, context=1, engine=NO_ENGINE)
        for here in (kept, large, fast)
    )
    assert step.seconds == pytest.approx(five_times.seconds)
    assert step.seconds < without.seconds / 4


def test_threads_wait_less_than_a_call():
    none, long = (replace(cpu(), reached=cpu().reached._replace(launch=launch)) for launch in (0.0, 1.0))
    seconds = [
        decode_step(ModelConfig(), ServingPlan(gpu="cpu"), here, batch=1, context=1, engine=NO_ENGINE).parts["norms"]
        for here in (none, long)
    ]
    launches = 4 * ModelConfig().num_hidden_layers
    assert seconds[1] - seconds[0] == pytest.approx(launches * CALLS.wait)


def test_forecast_figures_belong_together():
    model, plan, real = MIXTRAL, ServingPlan(tp=2, batch=64, price=3.0), machine("h100")
    mid = serve(model, plan, real)
    assert mid.price_output == pytest.approx(1000 * 2 * 3.0 / 3600 / mid.tokens_per_s)
    assert mid.price == pytest.approx(mid.price_output / 2)  # half of the tokens are prompts
    assert mid.tokens_per_s_per_gpu == mid.tokens_per_s / 2
    prompts = prefill(model, plan, real, tokens=512, batch=64)
    step = decode_step(model, plan, real, batch=64, context=768)
    assert mid.tokens_per_s == pytest.approx(64 * 512 / (prompts.seconds + 512 * step.seconds))
    assert 0 < mid.mfu < 1
    assert 0 < mid.bandwidth < 1
    found = forecast(model, plan, real)
    assert found.gpus == 2
    assert found.bound in {"memory", "compute", "launch", "links", "host", "pipeline"}
    for name, figure in found.figures.items():
        assert figure.mid == getattr(mid, name)
        assert figure.low < figure.mid < figure.high
        assert figure.moved_by in SERVING_SPREAD
    small = forecast(DENSE, ServingPlan(batch=1), real)
    assert small.figures["per_token"].moved_by == "bandwidth"
    assert small.figures["first_token"].moved_by == "gemm"


def test_frontier_marks_what_nothing_beats():
    plan, real = ServingPlan(tp=8, pp=2), machine("h100")

    def fits(tried: ServingPlan, context: float) -> bool:
        assert context == 1024
        return tried.tp * tried.pp >= 2 and tried.batch <= 64 * tried.tp

    points = frontier(DENSE, plan, real, fits, batches=(1, 8, 64, 512))
    assert {(p.plan.tp, p.plan.pp) for p in points} >= {(1, 2), (8, 1), (8, 2)}
    assert not any(p.gpus == 1 for p in points)
    for point in points:
        beaten = any(
            (q.per_token <= point.per_token and q.price < point.price)
            or (q.per_token < point.per_token and q.price <= point.price)
            for q in points
        )  # fmt: skip
        assert point.best == (not beaten)
    assert [p.per_token for p in points] == sorted(p.per_token for p in points)
    assert {(p.tp, p.pp) for p in layouts(DENSE, plan, real, gpus=12)} == {(1, 12), (2, 6), (4, 3)}
    with pytest.raises(ConfigError, match="no layout of up to 16 GPUs holds the model"):
        frontier(DENSE, plan, real, lambda tried, context: False)


def test_sweep_covers_every_pair():
    rows = sweep(
        MIXTRAL, ServingPlan(tp=2), machine("h100"), lambda plan, context: plan.batch * context <= 64000,
        batches=(1, 64), contexts=(100, 2000),
    )  # fmt: skip
    assert [(r.context, r.batch, r.fits) for r in rows] == [
        (100, 1, True), (100, 64, True), (2000, 1, True), (2000, 64, False)
    ]  # fmt: skip
    assert rows[1].mfu > rows[0].mfu
    assert rows[3].cache_bytes == pytest.approx(64 * 2001 * rows[0].cache_bytes / 101)


def test_tokens_of_a_verifying_step():
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert (expected_tokens(0, 4), expected_tokens(1, 4)) == (1, 5)
    assert expected_tokens(break_even(2.0, 4), 4) == pytest.approx(2.0)
    assert break_even(5.1, 4) is None
    assert break_even(1.0, 4) < 1e-9


def test_speculation_pays_while_bandwidth_bounds():
    plan, real = ServingPlan(gpu="h100", acceptance=0.7), machine("h100")
    dense = speculation_rows(DENSE, plan, real, context=100, draft_tokens=4, batches=(1, 1024), draft_share=0.02)
    assert dense[0].speedup > 2
    assert dense[1].speedup < 1
    assert dense[0].break_even < 0.15
    assert dense[1].break_even is None or dense[1].break_even > 0.7
    experts = speculation_rows(MIXTRAL, plan, real, context=100, batches=(1, 64), draft_share=0.02)
    assert experts[0].experts_plain == pytest.approx(2)
    assert experts[0].experts_verify == pytest.approx(8 * (1 - 0.75**5))
    assert experts[0].break_even > 2 * dense[0].break_even  # it reads three times the experts
    cost = experts[1].verify / experts[1].plain + 4 * 0.02
    assert experts[1].speedup == pytest.approx(expected_tokens(0.7, 4) / cost)


def test_speculation_in_a_plan():
    real = machine("h100")
    plain = serve(DENSE, ServingPlan(batch=1), real)
    drafted = serve(DENSE, ServingPlan(batch=1, draft_tokens=4, acceptance=0.8), real)
    refused = serve(DENSE, ServingPlan(batch=1, draft_tokens=4, acceptance=0.0), real)
    assert drafted.per_token < plain.per_token / 2
    assert refused.per_token > plain.per_token


def test_heads_and_bits():
    real = machine("a100-80")
    plan = ServingPlan(gpu="a100-80", tp=8, batch=64)
    rows = head_rows(replace(DENSE, num_key_value_heads=8), plan, real, context=3999)
    assert [row.name for row in rows] == ["MQA", "GQA 8", "MHA"]
    assert rows[2].cache_per_token == 32 * rows[0].cache_per_token
    assert rows[0].cache_bytes == rows[1].cache_bytes == rows[2].cache_bytes / 4  # 8 ranks have a head each, or 4
    assert rows[0].tokens_per_s > rows[2].tokens_per_s
    bits = {row.name: row for row in bits_rows(DENSE, plan, real, context=3999)}
    full, halves = bits["weights 16 bit, cache 16 bit"], bits["weights 8 bit, cache 8 bit"]
    assert halves.cache_bytes == full.cache_bytes / 2
    assert halves.seconds < full.seconds
    assert bits["weights 4 bit, cache 8 bit"].weight_bytes < 0.3 * full.weight_bytes
    mla = LatentAttention(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    with pytest.raises(ConfigError, match="no key-value heads to choose"):
        head_rows(replace(DENSE, mla=mla), plan, real, context=10)


def test_bounds_by_hand():
    h100 = machine("h100").sheet
    assert (flops_per_weight_byte(256, 8), flops_per_weight_byte(512, 8)) == (512, 1024)
    assert ridge(h100, "float8") == pytest.approx(1978.9e12 / 3.35e12)
    eight = 8 * h100.bandwidth
    assert readable_parameters(eight, 100 / 3, 16) == pytest.approx(402e9)  # a dense 1T is out of reach
    assert readable_parameters(34e9, 8, 4, share=0.5) == pytest.approx(4.25e9)
    with pytest.raises(ConfigError, match=r"share = 1.5 of the bandwidth"):
        readable_parameters(1.0, 1.0, 16, share=1.5)
