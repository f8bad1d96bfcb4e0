"""Shards against the model on the meta device, bytes in training and serving, and advice that works when followed."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from moe_lm.config import (
    ConfigError,
    LatentAttention,
    Mamba,
    ModelConfig,
    ServingPlan,
    TrainingPlan,
    VisionEncoder,
)
from moe_lm.scaling import meta
from moe_lm.scaling.activations import layer_activations
from moe_lm.scaling.advice import serving_advice, training_advice
from moe_lm.scaling.constants import FRAGMENTATION, RUNTIME_BYTES
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.hardware import machine
from moe_lm.scaling.layout import Stage, lay, settle, stages
from moe_lm.scaling.memory import fullest_stage, largest_batch, serving_memory, training_memory
from moe_lm.scaling.shards import held, numbers
from moe_lm.toml import load_config

CONFIGS = {path: load_config(f"configs/{path}.toml") for path in ("gpt4-1.8t", "mixtral-8x7b", "llama-2-7b", "nano")}
GPT4 = CONFIGS["gpt4-1.8t"].model
GROUPED = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=0, max_position_embeddings=8192,
)  # fmt: skip
SMALL = ModelConfig(
    vocab_size=1000, hidden_size=48, intermediate_size=96, num_attention_heads=12, num_key_value_heads=2, head_dim=4,
    num_local_experts=4, n_shared_experts=1, moe_intermediate_size=24,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tp", "pp", "ep"),
    [
        pytest.param(GPT4, 8, 15, 1, id="gpt4-training"),
        pytest.param(GPT4, 8, 16, 1, id="gpt4-serving"),
        pytest.param(CONFIGS["mixtral-8x7b"].model, 1, 1, 8, id="mixtral-experts"),
        pytest.param(CONFIGS["mixtral-8x7b"].model, 16, 4, 2, id="mixtral-all"),
        pytest.param(CONFIGS["nano"].model, 1, 1, 1, id="nano"),
        pytest.param(CONFIGS["nano"].model, 4, 2, 4, id="nano-all"),
        pytest.param(CONFIGS["llama-2-7b"].model, 8, 2, 1, id="llama-mha"),
        *(pytest.param(GROUPED, tp, 2, 1, id=f"llama-gqa-tp{tp}") for tp in (4, 8, 16)),
        pytest.param(SMALL, 4, 2, 2, id="shared-experts"),
        pytest.param(SMALL, 3 * 4, 1, 1, id="padded-vocabulary"),
        pytest.param(replace(SMALL, tie_word_embeddings=True), 2, 2, 1, id="tied"),
        pytest.param(replace(SMALL, tie_word_embeddings=True), 2, 1, 1, id="tied-one-stage"),
    ],
)
def test_shards_are_those_of_the_cut_state_dict(model, tp, pp, ep):
    assert meta.check(model, tp, pp, ep) == ()
    closed = tuple(2 * numbers(held(model, tp, stage, ep)) for stage in stages(model, pp))
    assert meta.sharded_bytes(model, tp, pp, ep) == closed


def test_a_wrong_shard_is_named(monkeypatch):
    right = meta.held
    monkeypatch.setattr(meta, "held", lambda *args: right(*args) | {"norm.weight": (47,)})
    differences = meta.check(SMALL, 1, 1, 1)
    assert differences == (
        "norm.weight on stage 0, tensor rank 0, expert rank 0: (47,) by closed form, (48,) cut from the model.",
    )


@pytest.mark.parametrize(
    ("model", "ep", "message"),
    [
        (replace(SMALL, mamba=Mamba()), 1, "model.mamba is counted in closed form only"),
        (SMALL, 3, "ep = 3 does not divide model.num_local_experts = 4"),
    ],
)
def test_the_meta_check_refuses(model, ep, message):
    with pytest.raises(ConfigError, match=message):
        meta.check(model, 1, 1, ep)


VISION = VisionEncoder(hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=28, patch_size=14,
                       cross_attention_period=2)  # fmt: skip
LATENT = LatentAttention(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, q_lora_rank=24)
KINDS = {
    "mixture": SMALL,
    "dense": replace(SMALL, num_local_experts=0, n_shared_experts=0, moe_intermediate_size=None),
    "mixed": replace(SMALL, first_k_dense_replace=1, expert_layer_period=2),
    "gpt2": replace(SMALL, block="gpt2", num_local_experts=0, n_shared_experts=0, tie_word_embeddings=True),
    "latent": replace(SMALL, mla=LATENT),
    "latent-plain-queries": replace(SMALL, mla=replace(LATENT, q_lora_rank=0)),
    "mamba": replace(SMALL, mamba=Mamba(attn_layer_period=2, attn_layer_offset=1, dt_rank=4)),
    "vision": replace(SMALL, vision=VISION),
}


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_one_rank_holds_the_model(model):
    whole = Stage(tuple(range(model.num_hidden_layers)), embedding=True, output=True)
    assert numbers(held(model, 1, whole, 1)) == parameters(model).total


@given(st.sampled_from(list(KINDS)), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_ranks_hold_all_of_what_is_cut_and_whole_what_is_not(kind, tp, ep, pp):
    model = replace(KINDS[kind], num_key_value_heads=4)
    assume(ep == 1 or model.is_moe)
    of_one = {}
    for stage in stages(model, pp):
        of_one |= held(model, 1, stage, 1)
        for name, shape in held(model, tp, stage, ep).items():
            copies = tp * (ep if ".mlp.experts." in name else 1)
            size, whole = math.prod(shape), math.prod(of_one[name])
            small = ("norm", "gate", "bias", "kv_a", "q_a", "positions", "encoder")
            assert size * copies == whole or (size == whole and any(part in name for part in small)), name
    if not model.tie_word_embeddings:
        assert numbers(of_one) == parameters(model).total


A100 = machine("a100-80")


def fullest(model, plan, rows=512, length=2048, hardware=A100):
    return fullest_stage(model, lay(model, plan, length, rows * length), hardware)


def test_training_by_hand():
    """Dense, D 8, F 16, V 32, 2 heads of 4 channels, 2 layers; 2 rows of 4 tokens at once; all on one GPU."""
    model = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, num_local_experts=0, max_position_embeddings=4)  # fmt: skip
    weights = 2 * 32 * 8 + 2 * (8 * 16 + 8 * 8 + 3 * 8 * 16 + 16) + 8
    layout = lay(model, TrainingPlan(micro_batch=2, zero=0), 4, 8)
    (stage,) = training_memory(model, layout, A100)
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * weights, 2 * weights, 12 * weights)
    # A token of a layer: norms in and out; q, k, v and what the heads gather; a float32 per head; gate, up, product.
    kept = 8 * 2 * (4 * 8 * 2 + (8 + 4 + 4 + 8) * 2 + 2 * 4 + 3 * 16 * 2)
    gradients = 8 * (2 * 8 * 2 + 2 * 16 * 2)
    assert stage.activations == kept + gradients
    assert stage.buffers == 8 * (32 * (2 + 4) + 2 * 8 * 2)
    assert stage.overhead == RUNTIME_BYTES + FRAGMENTATION * stage.activations
    assert stage.limit == 80 * 2**30
    wide = training_memory(model, replace(layout, plan=replace(layout.plan, dtype="float32")), A100)[0]
    assert (wide.weights, wide.gradients, wide.optimizer) == (4 * weights, 4 * weights, 8 * weights)


def gpt(layers, hidden, heads):
    return ModelConfig(block="gpt2", vocab_size=51200, hidden_size=hidden, intermediate_size=4 * hidden,
                       num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                       num_local_experts=0, max_position_embeddings=2048, tie_word_embeddings=True)  # fmt: skip


def test_activations_are_those_of_korthikanti():
    """Their table 2, for GPT-3: bytes of a layer are N D times the factor."""
    h, a, s, t = 12288, 96, 2048, 8
    model = gpt(96, h, a)
    plan = TrainingPlan(tp=t, flash_attention=False, recompute="none")
    for changes, factor in [
        ({"tp": 1}, 34 + 5 * a * s / h),
        ({"sequence_parallel": False}, 10 + 24 / t + 5 * a * s / (h * t)),
        ({}, 34 / t + 5 * a * s / (h * t)),
        ({"recompute": "selective", "sequence_parallel": False}, 10 + 24 / t),
        ({"recompute": "selective"}, 34 / t),
        ({"recompute": "full", "sequence_parallel": False}, 2),
    ]:
        assert layer_activations(model, 0, replace(plan, **changes), s, s, 1.1).kept == pytest.approx(s * h * factor)


@pytest.mark.parametrize(
    ("model", "sizes", "rows"),
    [
        pytest.param(gpt(48, 6144, 64), {"tp": 8, "micro_batch": 4}, 4, id="22B"),
        pytest.param(gpt(96, 12288, 96), {"tp": 8, "pp": 8, "interleave": 3}, 64, id="175B"),
        pytest.param(gpt(105, 20480, 128), {"tp": 8, "pp": 35, "interleave": 3}, 280, id="530B"),
        pytest.param(gpt(128, 25600, 160), {"tp": 8, "pp": 64}, 512, id="1T"),
    ],
)
def test_what_korthikanti_ran_fits_and_their_baseline_does_not(model, sizes, rows):
    """Korthikanti et al. 2022, table 3 and figure 1: A100 of 80 GB, without sharding over replicas."""
    plan = TrainingPlan(**sizes, zero=0, flash_attention=False, recompute="selective")
    assert fullest(model, plan, rows).fits
    assert not fullest(model, replace(plan, recompute="none", sequence_parallel=False), rows).fits


def test_mixture_activations_by_hand():
    plan = TrainingPlan(tp=2, ep=2, expert_imbalance=1.5, sequence_parallel=False)
    D, K, F, S, E = 48, 2 * 1.5, 24, 1, 4
    expected = (
        4 * D * 2  # norms in and out
        + (2 * 6 + 2 * 1) * 4 * 2 + 4 * 6  # q, gathered, k, v; flash attention's float32
        + E * 4 + 2 * 12  # router
        + K * D * 2 + 3 * (K + S) * F / 2 * 2  # dispatched, hidden
    )  # fmt: skip
    assert layer_activations(SMALL, 0, plan, 10, 10, 1.1).kept == pytest.approx(10 * expected)


def test_micro_batches_in_flight():
    model, plan = replace(SMALL, num_hidden_layers=16), TrainingPlan(pp=4, zero=0)
    one = layer_activations(model, 0, plan, 2048, 2048, 1.1)
    for rows, chunks, in_flight in [(64, 1, [4, 3, 2, 1]), (2, 1, [2, 2, 2, 1]), (64, 2, [5.5, 4.5, 3.5, 2.5])]:
        stage_list = training_memory(model, lay(model, replace(plan, interleave=chunks), 2048, rows * 2048), A100)
        layers = [len(stage.layers) for stage in stages(model, 4, chunks)]
        expected = [n * count * one.kept + one.working for n, count in zip(in_flight, layers, strict=True)]
        assert [stage.activations for stage in stage_list] == pytest.approx(expected)


def test_sharding_by_hand():
    run = CONFIGS["mixtral-8x7b"]
    run = replace(run, plan=replace(run.plan, tp=1))
    count = parameters(run.model)
    dense, experts = count.total - count.experts, count.experts
    for zero, weights, gradients, optimizer in [
        (0, dense + experts / 8, dense + experts / 8, dense + experts / 8),
        (1, dense + experts / 8, dense + experts / 8, count.total / 64),
        (2, dense + experts / 8, count.total / 64, count.total / 64),
        (3, count.total / 64, count.total / 64, count.total / 64),
    ]:
        (stage,) = training_memory(run.model, settle(replace(run, plan=replace(run.plan, zero=zero))), A100)
        expected = (2 * weights, 2 * gradients, 12 * optimizer)
        assert (stage.weights, stage.gradients, stage.optimizer) == pytest.approx(expected)
    hybrid = settle(replace(run, plan=replace(run.plan, zero=3, zero_group=16)))
    (stage,) = training_memory(run.model, hybrid, A100)
    assert stage.optimizer == pytest.approx(12 * (dense / 16 + experts / 8 / 2))


plans = st.builds(
    TrainingPlan, gpus=st.just(64), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 4]), zero=st.sampled_from([0, 1, 2]), recompute=st.sampled_from(["none", "selective"]),
    micro_batch=st.sampled_from([1, 2, 4]), sequence_parallel=st.booleans(), flash_attention=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float32"]), interleave=st.sampled_from([1, 2]),
)  # fmt: skip


@given(st.sampled_from(list(KINDS)), plans)
def test_what_should_save_memory_never_takes_more(kind, plan):
    model = replace(KINDS[kind], num_key_value_heads=4, num_hidden_layers=8)
    assume(plan.pp > 1 or plan.interleave == 1)
    plan = plan if model.is_moe else replace(plan, ep=1)
    total = fullest(model, plan).total
    for changes in (
        {"zero": plan.zero + 1},
        {"recompute": "selective" if plan.recompute == "none" else "full"},
        {"recompute": "full"},
        {"sequence_parallel": True},
        {"flash_attention": True},
    ):
        assert fullest(model, replace(plan, **changes)).total <= total * (1 + 1e-12), changes
    for times in (2, 4):
        if plan.tp * times <= 4:
            more = replace(plan, tp=plan.tp * times, gpus=64 * times)
            assert fullest(model, more).total <= total * (1 + 1e-12), more


@given(st.sampled_from(list(KINDS)), plans)
def test_the_fullest_stage_is_that_of_all(kind, plan):
    model = replace(KINDS[kind], num_key_value_heads=4, num_hidden_layers=8)
    assume(plan.pp > 1 or plan.interleave == 1)
    layout = lay(model, plan if model.is_moe else replace(plan, ep=1), 2048, 2**20)
    everything = training_memory(model, layout, A100)
    assert fullest_stage(model, layout, A100).total == max(stage.total for stage in everything)


def test_reported_training_layout():
    """F17 and F18: weights and bfloat16 gradients are 60 GB, and only sharded optimizer states fit beside them."""
    run = CONFIGS["gpt4-1.8t"]
    plan = replace(run.plan, recompute="full")
    fits = {}
    for name, changes in {
        "none": {"zero": 0}, "ZeRO-1": {"zero": 1}, "ZeRO-1 in groups of 8": {"zero": 1, "zero_group": 8},
        "FSDP": {"zero": 3}, "hybrid FSDP": {"zero": 3, "zero_group": 8},
    }.items():  # fmt: skip
        stage_list = training_memory(run.model, settle(replace(run, plan=replace(plan, **changes))), A100)
        fits[name] = all(stage.fits for stage in stage_list)
        if changes == {"zero": 1}:
            assert all(stage.weights == pytest.approx(30e9, rel=0.03) for stage in stage_list)
            assert all(stage.weights + stage.gradients == pytest.approx(60e9, rel=0.03) for stage in stage_list)
    assert fits == {
        "none": False, "ZeRO-1": True, "ZeRO-1 in groups of 8": False, "FSDP": True, "hybrid FSDP": True,
    }  # fmt: skip


def cache(model, batch, context, **sizes):
    plan = ServingPlan(**sizes)
    return serving_memory(model, plan, A100, batch=batch, context=context)


def test_cache_facts():
    """F06, F08 and F54."""
    heads = replace(GPT4, num_key_value_heads=120)
    assert cache(heads, 1, 8192).cache == 120 * cache(GPT4, 1, 8192).cache
    large = ModelConfig(hidden_size=6144, num_hidden_layers=118, num_attention_heads=48, num_key_value_heads=48,
                        head_dim=128, num_local_experts=0, max_position_embeddings=2048)  # fmt: skip
    assert cache(large, 512, 2048).cache == pytest.approx(3e12, rel=0.05)
    jamba = ModelConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                        mamba=Mamba(), max_position_embeddings=2**18)  # fmt: skip
    mistral = replace(GROUPED, vocab_size=32000)
    for model, gib in [(CONFIGS["llama-2-7b"].model, 128), (mistral, 32), (jamba, 4)]:
        assert cache(model, 1, 2**18).cache == gib * 2**30
        assert cache(model, 1, 2**18, kv_bits=8).cache == gib * 2**29
    assert cache(jamba, 3, 2**18, tp=8).state == 3 * 28 * 2 * 4096 / 8 * (16 * 4 + 4 * 2)


def test_one_head_is_replicated():
    """Every one of 8 ranks holds the one key-value head: 8 times what the cache would take if it were shared."""
    memory = cache(GPT4, 16, 8192, tp=8, pp=16)
    assert memory.cache == 16 * 8192 * 8 * 2 * 128 * 2
    assert memory.replicated_cache == memory.cache * 7 / 8
    assert cache(GROUPED, 16, 8192, tp=8).replicated_cache == 0
    assert cache(GROUPED, 16, 8192, tp=16).replicated_cache == cache(GROUPED, 16, 8192, tp=16).cache / 2
    latent = cache(KINDS["latent"], 2, 100, tp=4)
    assert (latent.cache, latent.replicated_cache) == (2 * 100 * 4 * 20 * 2, latent.cache * 3 / 4)


def test_reported_serving_layout():
    """F30: the mean of 120 layers over 16 stages is below 30 GB a GPU, and 15 GB at 8 bits; 8 layers are more."""
    half, eighth = cache(GPT4, 1, 8192, tp=8, pp=16), cache(GPT4, 1, 8192, tp=8, pp=16, weight_bits=8)
    assert (half.mean_weights, half.weights) == pytest.approx((28.3e9, 30.2e9), rel=0.01)
    assert (eighth.mean_weights, eighth.weights) == pytest.approx((14.2e9, 15.1e9), rel=0.01)
    assert cache(GPT4, 1, 8192, tp=8, pp=16, weight_bits=4).weights == pytest.approx(7.8e9, rel=0.01)
    assert half.mean_weights * 16 == sum(meta.sharded_bytes(GPT4, 8, 16, 1))


def test_largest_batches_of_the_reported_layout():
    """F07: with every head its own keys and values, 32k cannot give each of 16 stages a request on 40 GB."""
    plan = CONFIGS["gpt4-1.8t"].serving
    shared = {gpu: [largest_batch(GPT4, plan, machine(gpu), context) for context in (8192, 16384, 32768)]
              for gpu in ("a100-40", "a100-80", "h100")}  # fmt: skip
    heads = {gpu: [largest_batch(replace(GPT4, num_key_value_heads=120), plan, machine(gpu), context)
                   for context in (8192, 16384, 32768)] for gpu in ("a100-40", "a100-80", "h100")}  # fmt: skip
    for batches in (*shared.values(), *heads.values()):
        assert batches[0] > batches[1] > batches[2] > 0
    assert heads["a100-40"][2] < 16 <= heads["a100-40"][0] < 32
    assert shared["a100-40"][0] < 512 < shared["a100-80"][0]
    for gpu in shared:
        assert shared[gpu][2] >= 14 * heads[gpu][2]


@pytest.mark.parametrize("gpu", ["a100-40", "h100"])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"ep": 4, "kv_bits": 8}, {"pp": 2, "weight_bits": 4}])
def test_the_largest_batch_fits_and_one_more_does_not(gpu, sizes):
    plan, model = ServingPlan(**sizes), replace(SMALL, num_hidden_layers=8)
    most = largest_batch(model, plan, machine(gpu), 4096)
    assert serving_memory(model, plan, machine(gpu), batch=most, context=4096).fits
    assert not serving_memory(model, plan, machine(gpu), batch=most + 1, context=4096).fits
    assert largest_batch(GPT4, plan, machine(gpu), 8192) == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 7}, "serving.tp = 7 does not divide model.num_attention_heads"),
        ({"pp": 5}, "serving.pp = 5 is more than model.num_hidden_layers = 4"),
        ({"ep": 3}, "serving.ep = 3 does not divide model.num_local_experts = 4"),
    ],
)
def test_serving_refuses_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(ConfigError, match=message):
        cache(SMALL, 1, 256, **sizes)


def told(sentence, section):
    """The settings that a sentence names, as it names them."""
    found = re.findall(rf'{section}\.(\w+) = "?(\w+)', sentence.partition(": ")[2])
    return {name: int(value) if value.isdigit() else {"true": True}.get(value, value) for name, value in found}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpt4-1.8t", "mixtral-8x7b", "llama-2-7b"]), st.sampled_from(["a100-40", "h100"]), plans,
       st.sampled_from([1, 8]), st.sampled_from([None, 1, 2]))  # fmt: skip
def test_training_advice_works_when_followed(name, gpu, plan, more, zero_group):
    run, hardware = CONFIGS[name], machine(gpu)
    plan = replace(plan, gpus=64 * more, ep=plan.ep if run.model.is_moe else 1, zero_group=zero_group)
    try:
        layout = lay(run.model, plan, run.data.sequence_length, run.train.batch_tokens)
    except ConfigError:
        reject()
    memory = training_memory(run.model, layout, hardware)
    sentence = training_advice(memory, run.model, layout, hardware)
    if all(stage.fits for stage in memory):
        assert "fits" in sentence
    elif "no layout" not in sentence:
        changes = told(sentence, "plan")
        assert changes, sentence
        followed = replace(run, plan=replace(plan, **changes))
        assert all(stage.fits for stage in training_memory(run.model, settle(followed), hardware)), sentence


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["gpt4-1.8t", "mixtral-8x7b", "llama-2-7b"]), st.sampled_from([1, 2, 8]),
       st.sampled_from([1, 4]), st.sampled_from([1, 4, 256, 4096]), st.sampled_from([4, 8, 16]))  # fmt: skip
def test_serving_advice_works_when_followed(name, tp, pp, batch, bits):
    model, hardware = CONFIGS[name].model, machine("a100-40")
    plan = ServingPlan(tp=tp, pp=pp, weight_bits=bits)
    memory = serving_memory(model, plan, hardware, batch=batch, context=8192)
    sentence = serving_advice(memory, model, plan, hardware)
    if memory.fits:
        assert "fits" in sentence
    elif "no layout" not in sentence:
        changes = told(sentence, "serving")
        followed = replace(plan, **changes)
        batch = changes.get("batch", batch)
        assert serving_memory(model, followed, hardware, batch=batch, context=8192).fits, sentence


def test_plans_need_no_torch():
    code = "import sys, moe_lm.scaling.search, moe_lm.scaling.advice; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_sentences():
    run = CONFIGS["gpt4-1.8t"]
    layout = settle(replace(run, plan=replace(run.plan, recompute="selective", zero=1)))
    sentence = training_advice(training_memory(run.model, layout, A100), run.model, layout, A100)
    assert re.fullmatch(
        r"Stage 0 of the pipeline needs [\d.]+ GB, [\d.]+ GB more than the 85.9 GB of A100 SXM 80 GB: "
        r'plan.recompute = "full" makes it [\d.]+ GB.',
        sentence,
    )
    tiny = replace(A100, sheet=replace(A100.sheet, memory=10**9))
    hopeless = training_advice(training_memory(run.model, layout, tiny), run.model, layout, tiny)
    assert "no layout that was tried fits" in hopeless
    memory = serving_memory(GPT4, run.serving, tiny, batch=1, context=8192)
    assert "The fullest GPU with 1 request of 8192 tokens" in serving_advice(memory, GPT4, run.serving, tiny)
