"""Facts of inference: F30 to F39.

E experts, K experts per token, T tokens.
"""

from dataclasses import replace

from moe_lm.config import ServingPlan
from moe_lm.scaling import routing
from moe_lm.scaling.configs import model_of, run_of
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.facts.row import Draft, fact, listed
from moe_lm.scaling.hardware import load_hardware, machine
from moe_lm.scaling.layout import stages
from moe_lm.scaling.serving import decode_step, expected_tokens, serve
from moe_lm.scaling.serving_choices import flops_per_weight_byte, readable_parameters, ridge
from moe_lm.scaling.speculation import speculation_rows

WORDS = 1 / 2
"""Words of a token, as the reports take it: 1,000 words a minute are 33.33 tokens/s."""

EIGHT_BITS = {"weight_bits": 8, "kv_bits": 8, "dtype": "float8"}


@fact("F30", "128 GPUs, 8-way tensor x 16-way pipeline: under 30 GB of fp16 weights per GPU, under 15 GB at 8 bit")
def weights_of_serving(row: Draft) -> str:
    run = run_of("gpt4-1.8t-serve")
    ranks, total = run.serving.tp * run.serving.pp, parameters(run.model).total
    row.exact("GPUs", ranks, 128, "GPUs")
    row.bound("fp16 weights per GPU", total * 2 / ranks, "under 30B", "bytes", total * 2 / ranks < 30e9)
    row.bound("8-bit weights per GPU", total / ranks, "under 15B", "bytes", total / ranks < 15e9)
    node = total / run.serving.pp
    row.contradiction("parameters per node", node, 130e9, "parameters")
    return f"1.81T / 128; a node of 8 holds 1.81T / 16 = {node / 1e9:.0f}B, not the 130B reported"


@fact("F31", "120 layers over 15 to 16 nodes, fewer layers on the head node")
def balanced_split(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    for pp in (15, 16):
        held = [len(stage.layers) for stage in stages(model, pp)]
        fewest = held[0] == min(held)
        row.bound(f"layers on {pp} nodes, head first", listed(held), "fewest on the head", "layers", fewest)
    return "the heaviest stage as light as can be, the table of tokens and the output counted, then evenly"


@fact("F32", "8k context: $0.0049 per 1k tokens on 128 A100, $0.0021 on 128 H100, at high utilisation and large batch")
def serving_price(row: Draft) -> str:
    run = run_of("gpt4-1.8t-serve")
    older, newer = run.serving, replace(run.serving, gpu="h100", batch=2 * run.serving.batch, **EIGHT_BITS)
    told = {plan.gpu: serve(run.model, plan, machine(plan.gpu)) for plan in (older, newer)}
    for (name, given), reported in zip(told.items(), (0.0049, 0.0021), strict=True):
        row.near(f"128 x {name}", given.price, reported, "$ per 1k tokens", 0.25)
    row.near("A100 over H100", told[older.gpu].price / told[newer.gpu].price, 2.33, "x", 0.15)
    for name, given in told.items():
        row.show(f"MFU on {name}", given.mfu, "of the peak")
        row.show(f"price of an hour of {name}", load_hardware(name).price, "$")
    return (
        f"A100: 16 bits, {older.batch} requests of {older.prompt_tokens:,} + {older.output_tokens:,} tokens at once; "
        f"H100: 8 bits, which halve a request's bytes, and {newer.batch} of them; the batches are chosen, not reported"
    )


@fact("F33", "3x the cost of a 175B dense model for 1.6x its active parameters")
def against_dense(row: Draft) -> str:
    large, dense = run_of("gpt4-1.8t-serve"), run_of("gpt3-175b")
    row.near("active parameters", parameters(large.model).active / parameters(dense.model).total, 1.6, "x", 0.05)
    ours = serve(large.model, large.serving, machine("a100-80"))
    theirs = serve(dense.model, dense.serving, machine("a100-80"))
    row.show("price of a token, 128 against 8 A100", ours.price / theirs.price, "x", reported=3.0)
    alike = serve(replace(dense.model, num_key_value_heads=1), replace(dense.serving, batch=large.serving.batch // 16),
                  machine("a100-80"))  # fmt: skip
    row.show(
        "if the dense one had one KV head, and as many requests per GPU", ours.price / alike.price, "x", reported=3.0
    )
    plan = dense.serving
    return (
        f"the dense model on {plan.tp * plan.pp} GPUs, {plan.batch} requests of {plan.prompt_tokens} + "
        f"{plan.output_tokens} tokens; the batch that fits, not the FLOP, sets the price"
    )


@fact("F34", "batch 8, top-2 of 16: an expert sees 1 token on average, and some see 8, 4, 1 or 0")
def tokens_of_an_expert(row: Draft) -> str:
    E, K, T = 16, 2, 8
    row.exact("tokens of an expert, mean", routing.mean_tokens(E, K, T), 1.0, "tokens")
    chances = routing.token_distribution(E, K, T)
    drawn = routing.simulate([1 / E] * E, K, T, trials=2000)
    for n in (0, 1, 4, 8):
        simulated = sum(counts.count(n) for counts in drawn) / (E * len(drawn))
        row.show(f"chance of {n} tokens, closed form", chances[n])
        row.show(f"chance of {n} tokens, 2,000 simulated batches", simulated)
    loads = routing.load_counts(routing.TRAINED_ROUTER)
    for each in routing.routing_rows(loads.shares, loads.top_k, loads.tokens, real=loads):
        row.show(f"trained router, {loads.tokens} tokens: {each.name}", each.real, f"(uniform {each.uniform:.3g})")
    return "T K / E; binomial of 8 tries at 1/8; a trained router spreads its windows of text less evenly"


@fact("F35", "serving batch 4k+ gives about 500 tokens per expert")
def large_batch(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    each = routing.mean_tokens(model.num_local_experts, model.num_experts_per_tok, 4096)
    row.near("tokens of an expert at batch 4,096", each, 500, "tokens", 0.05)
    return "4,096 x 2 / 16"


@fact("F36", "every parameter is read once per step for 2 FLOP: an 8-bit byte carries 512/1,024 FLOP at batch 256/512")
def arithmetic_intensity(row: Draft) -> str:
    row.exact("batch 256", flops_per_weight_byte(256, 8), 512.0, "FLOP per byte")
    row.exact("batch 512", flops_per_weight_byte(512, 8), 1024.0, "FLOP per byte")
    sheet = load_hardware("h100")
    row.show("H100, 8-bit FLOP/s over bandwidth", ridge(sheet, "float8"), "FLOP per byte", reported=2000 / 3)
    row.show("batch where a dense model turns compute-bound", ridge(sheet, "float8") / 2, "requests")
    return "2 FLOP for each request and weight; at batch 1 it is 2, so that bandwidth bounds it"


@fact("F37", "33.33 tokens/s of a dense 1T model is out of reach of 8 H100s' bandwidth; their limit is about 300B")
def dense_limit(row: Draft) -> str:
    gpu, model = machine("h100"), model_of("dense-1t")
    wanted = 1000 / 60 / WORDS
    bandwidth = 8 * gpu.sheet.bandwidth
    needed = parameters(model).total * 2 * wanted
    row.bound("bandwidth needed, 16 bit", needed, f"above {bandwidth / 1e12:.1f}T", "bytes/s", needed > bandwidth)
    step = decode_step(model, ServingPlan(tp=8), gpu, batch=1, context=1024)
    row.bound("tokens/s predicted on 8 H100, batch 1", step.tokens_per_s, "below 33.3", "tokens/s",
              step.tokens_per_s < wanted)  # fmt: skip
    used = 20 * 2 * parameters(model).total / (8 * gpu.sheet.peak("bfloat16"))
    row.bound("FLOP/s used at 20 tokens/s", used, "below 5%", "of the peak", used < 0.05)
    limit = readable_parameters(bandwidth, wanted, 16, gpu.reached.bandwidth)
    row.near("largest dense model at 33.33 tokens/s", limit, 300e9, "parameters", 0.35)
    share = f"{gpu.reached.bandwidth:.0%}"
    return f"8 x 3.35 TB/s at the {share} that kernels reach, over 2 bytes x 33.33; no time for anything but weights"


@fact("F38", "speculative decoding, about 4 tokens: (1-a^(g+1))/(1-a) per step; pays only while bandwidth-bound")
def speculation(row: Draft) -> str:
    for a in (0.6, 0.7, 0.8, 0.9):
        row.show(f"tokens per step at acceptance {a}, 4 drafted", expected_tokens(a, 4), "tokens")
    run = run_of("gpt4-1.8t-serve")
    for each in speculation_rows(
        run.model, run.serving, machine("a100-80"), context=4096, batches=(1, 16, 64, 256, 1024, 4096)
    ):
        pays = "never pays" if each.break_even is None else f"pays from acceptance {each.break_even:.2f}"
        row.show(f"batch {each.batch}", pays, f"reads {each.experts_verify:.1f} for {each.experts_plain:.1f} experts")
    return "Leviathan et al. 2023, section 3.1; verifying reads E (1 - (1 - K/E)^T) experts, so a mixture pays less"


@fact("F39", "a phone of 34 GB/s: about 1B fp16 or 4B int4 parameters at reading speed")
def phone(row: Draft) -> str:
    for words in (250, 500, 1000):
        speed = words / 60 / WORDS
        for bits, reported in ((16, 1e9), (4, 4e9)):
            limit = readable_parameters(34e9, speed, bits)
            row.show(f"{bits} bit at {words} words a minute", limit, "parameters", reported)
    return "34 GB/s over bytes per parameter and tokens/s: the report's figures are of 500 words a minute"
