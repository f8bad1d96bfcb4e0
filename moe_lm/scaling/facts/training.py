"""Facts of training: F10 to F20.

p stages of the pipeline, m micro-batches.
"""

from dataclasses import replace

from moe_lm.scaling.collectives import all_reduce
from moe_lm.scaling.configs import run_of
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.facts.row import Draft, fact
from moe_lm.scaling.goodput import goodput
from moe_lm.scaling.hardware import load_hardware, machine
from moe_lm.scaling.layout import settle
from moe_lm.scaling.memory import training_memory
from moe_lm.scaling.training import forecast

TOKENS = 13e12
"""Of the reported run."""
HOUR, DAY = 3600, 86400


def training_flops() -> float:
    """6 FLOP per active parameter and token (Kaplan et al. 2020, section 2.1)."""
    return 6 * parameters(run_of("gpt4-1.8t").model).active * TOKENS


@fact("F10", "13T tokens; text 2 epochs, code 4 epochs")
def unique_tokens(row: Draft) -> str:
    train = run_of("gpt4-1.8t").train
    row.near("tokens of the config", train.steps * train.batch_tokens, TOKENS, "tokens", 0.001)
    for code in (0.1, 0.2, 0.3, 0.5):
        text, coded = (1 - code) * TOKENS / 2, code * TOKENS / 4
        row.show(f"unique text, {code:.0%} of the tokens seen being code", text, "tokens")
        row.show(f"unique code, {code:.0%} of the tokens seen being code", coded, "tokens")
    return "unique text = (1 - c) 13T / 2, unique code = c 13T / 4 for a share c of code; the mix is not reported"


@fact("F11", "2.15e25 training FLOPs")
def total_flops(row: Draft) -> str:
    row.near("6 x active parameters x tokens", training_flops(), 2.15e25, "FLOP", 0.03)
    return "forward 2, backward 4 per active parameter and token; attention's scores and recomputation not counted"


@fact("F12", "about 25,000 A100, 90 to 100 days, MFU 32% to 36%")
def duration(row: Draft) -> str:
    peak = load_hardware("a100-80").peak("bfloat16")
    low, high = (training_flops() / (25000 * peak * days * DAY) for days in (100, 90))
    row.bound("MFU of 90 to 100 days", f"{low:.1%} to {high:.1%}", "32% to 36%", "", low <= 0.36 and high >= 0.32)
    run = run_of("gpt4-1.8t")
    told = forecast(run, settle(run), machine(run.plan.gpu))
    days, mfu = told.days, told.mfu
    row.bound(
        "days predicted for the config's layout", f"{days.low:.0f} to {days.high:.0f}, mid {days.mid:.0f}",
        "90 to 100", "days", days.low <= 100 and days.high >= 90,
    )  # fmt: skip
    row.bound(
        "MFU predicted for it, failures included", f"{mfu.low:.1%} to {mfu.high:.1%}, mid {mfu.mid:.1%}",
        "32% to 36%", "", mfu.low <= 0.36 and mfu.high >= 0.32,
    )  # fmt: skip
    return "2.16e25 FLOP / (25,000 x 312 TFLOP/s x days); the prediction takes none of these, but the config's layout"


@fact("F13", "at $1 per A100-hour about $63M")
def cost(row: Draft) -> str:
    hours = training_flops() / (0.32 * load_hardware("a100-80").peak("bfloat16")) / HOUR
    row.near("at the low MFU reported, 32%", hours, 63e6, "$", 0.10)
    row.show("of 25,000 GPUs for 100 days", 25000 * 100 * 24, "$")
    return "A100-hours at $1; $63M are 105 days of 25,000 GPUs, a little more than the 90 to 100 reported"


@fact("F14", "on about 8,192 H100 at $2 per hour: about 55 days, $21.5M")
def on_h100(row: Draft) -> str:
    seconds = 55 * DAY
    row.near("cost", 8192 * seconds / HOUR * 2, 21.5e6, "$", 0.03)
    mfu = training_flops() / (8192 * seconds * load_hardware("h100").peak("bfloat16"))
    row.near("MFU that this implies", mfu, 0.56, "of dense bfloat16", 0.03)
    return "8,192 x 55 x 24 GPU-hours; an MFU that no published run of a mixture this size has reached in bfloat16"


@fact("F15", "pretraining context 8k; 32k by fine-tuning afterwards")
def contexts(row: Draft) -> str:
    first, second = run_of("gpt4-1.8t"), run_of("gpt4-1.8t-32k")
    row.exact("context of the first config", first.data.sequence_length, 8192, "tokens")
    row.exact("context of the second", second.data.sequence_length, 32768, "tokens")
    row.exact("parameters of the second", parameters(second.model).total, parameters(first.model).total, "parameters")
    return "configs gpt4-1.8t and gpt4-1.8t-32k: the same weights, rotary positions stretched"


@fact("F16", "batch ramped up to 60M tokens = 7.5M tokens per expert")
def batch_per_expert(row: Draft) -> str:
    run = run_of("gpt4-1.8t")
    batch, model = run.train.batch_tokens, run.model
    each = batch * model.num_experts_per_tok / model.num_local_experts
    row.exact("tokens of a step", batch, 60_000_000, "tokens")
    row.exact("tokens per expert", each, 7_500_000.0, "tokens")
    return "60M x 2 / 16, on average"


@fact("F17", "8-way tensor x 15-way pipeline parallel: about 30 GB of fp16 weights per GPU")
def weights_per_gpu(row: Draft) -> str:
    run = run_of("gpt4-1.8t")
    ranks = run.plan.tp * run.plan.pp
    row.exact("GPUs that hold the model once", ranks, 120, "GPUs")
    row.near("weights per GPU, mean", parameters(run.model).total * 2 / ranks, 30e9, "bytes", 0.03)
    stages = training_memory(run.model, settle(run), machine(run.plan.gpu))
    heaviest = max(stage.weights for stage in stages)
    row.show("weights per GPU, heaviest stage", heaviest, "bytes")
    return "1.81T x 2 bytes / 120; one key-value head, norms and router are whole on every rank"


@fact("F18", "ZeRO stage 1, or block-level FSDP / hybrid sharding; weights + bf16 gradients alone about 60 GB")
def sharding(row: Draft) -> str:
    run, gpu = run_of("gpt4-1.8t"), machine("a100-80")
    ranks = run.plan.tp * run.plan.pp
    row.near("weights + bf16 gradients per GPU", parameters(run.model).total * 4 / ranks, 60e9, "bytes", 0.03)
    ways = {
        "ZeRO-0": {"zero": 0}, "ZeRO-1": {"zero": 1}, "ZeRO-2": {"zero": 2}, "FSDP (ZeRO-3)": {"zero": 3},
        "hybrid FSDP in groups of 8": {"zero": 3, "zero_group": 8},
    }  # fmt: skip
    for name, change in ways.items():
        planned = replace(run, plan=replace(run.plan, **change))
        stages = training_memory(planned.model, settle(planned), gpu)
        worst = max(stages, key=lambda stage: stage.total)
        verdict = "fits" if worst.fits else f"does not fit {worst.limit / 1e9:.1f}"
        row.show(f"{name}, fullest stage", f"{worst.total / 1e9:.1f} GB, {verdict}")
    return "two bytes each of weights and gradients, twelve of master weights and moments, and activations"


@fact("F19", "pipeline bubble (p-1)/(m+p-1); head stage balanced for the embedding")
def bubble(row: Draft) -> str:
    layout = settle(run_of("gpt4-1.8t"))
    p, m = layout.plan.pp, layout.micro_batches
    row.show(f"p = {p}, m = {m}, as the config is laid out", (p - 1) / (m + p - 1), "of the step")
    for count in (15, 60, 240):
        row.show(f"p = {p}, m = {count}", (p - 1) / (count + p - 1), "of the step")
    return (
        f"60M tokens are {layout.batch_tokens / layout.sequence_length:.0f} rows: {m} for each of {layout.dp} replicas"
    )


@fact("F20", "low MFU partly from failures that restart from checkpoints, partly from all-reduce over weak links")
def failures(row: Draft) -> str:
    run = run_of("gpt4-1.8t")
    layout, gpu = settle(run), machine(run.plan.gpu)
    lost = goodput(parameters(run.model).total, layout.gpus)
    row.show("time between failures", lost.seconds_between_failures / HOUR, "hours")
    row.show("checkpoint", lost.checkpoint_bytes, "bytes")
    row.show("work between checkpoints", lost.interval_seconds / 60, "minutes")
    row.show("goodput", lost.share, "of the clock")
    gradients = parameters(run.model).total * 2 / (run.plan.tp * run.plan.pp)
    for name, weak in (("one island", 0.0), ("islands, 400G between", 50e9 / 8), ("islands, 200G between", 25e9 / 8)):
        linked = replace(gpu, sheet=replace(gpu.sheet, island_gpus=2048 if weak else 0, weak_network=weak))
        seconds = all_reduce(linked, gradients, layout.dp, run.plan.tp * run.plan.pp)
        row.show(f"all-reduce of gradients, {name}", seconds, "s")
    return "failures per GPU-hour and checkpoint rates as published (constants.RELIABILITY); rings, level by level"
