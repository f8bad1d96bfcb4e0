"""Facts of the full layout's shape: F01 to F08."""

from dataclasses import replace

from moe_lm.config import ModelConfig
from moe_lm.scaling.configs import model_of, run_of
from moe_lm.scaling.counts import cache_numbers, parameters
from moe_lm.scaling.facts.row import Draft, fact
from moe_lm.scaling.hardware import machine
from moe_lm.scaling.memory import largest_batch, serving_memory


def multi_head(model: ModelConfig) -> ModelConfig:
    """The same model with a key-value head for every query head."""
    return replace(model, num_key_value_heads=model.num_attention_heads)


@fact("F01", "about 1.8 trillion parameters in 120 layers, more than 10x GPT-3")
def total_parameters(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    total, older = parameters(model).total, parameters(model_of("gpt3-175b")).total
    row.near("parameters", total, 1.8e12, "parameters", 0.02)
    row.exact("layers", model.num_hidden_layers, 120, "layers")
    row.bound("over GPT-3", total / older, "more than 10", "x", total > 10 * older)
    return "sum over components of the closed form; 16 experts, attention, router, norms, two tables of tokens"


@fact("F02", "16 MLP experts of about 111B parameters each, 2 routed per forward pass")
def expert_parameters(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    D, F, L = model.hidden_size, model.expert_size, model.num_hidden_layers
    row.near("one expert, all layers", 3 * D * F * L, 111e9, "parameters", 0.02)
    row.exact("experts", model.num_local_experts, 16, "experts")
    row.exact("experts per token", model.num_experts_per_tok, 2, "experts")
    return f"3 D F L = 3 x {D:,} x {F:,} x {L}; 111B each would make {16 * 111e9 / 1e12:.2f}T of experts alone"


@fact("F03", "about 55B shared parameters in attention")
def attention_parameters(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    row.near("attention", parameters(model).attention, 55e9, "parameters", 0.02)
    H, G, C = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    return f"L (2 H + 2 G) C D with H = {H} query heads, G = {G} key-value head, C = {C}"


@fact("F04", "about 280B parameters used per token")
def active_parameters(row: Draft) -> str:
    counts = parameters(model_of("gpt4-1.8t"))
    row.near("active parameters", counts.active, 280e9, "parameters", 0.02)
    return "2 of 16 experts, and all that is not experts; the token table counts whole, by custom"


@fact("F05", '"560 TFLOP" per forward pass; dense "3,700 TFLOP"')
def forward_flops(row: Draft) -> str:
    counts = parameters(model_of("gpt4-1.8t"))
    row.contradiction("forward pass of a token", 2 * counts.active, 560e12, "FLOP")
    row.near("of 1,000 tokens", 2 * counts.active * 1000, 560e12, "FLOP", 0.03)
    row.near("dense, of 1,000 tokens", 2 * counts.total * 1000, 3.7e15, "FLOP", 0.03)
    return (
        f"2 x {counts.active / 1e9:.1f}B = {2 * counts.active / 1e9:.0f} GFLOP per token: the printed TFLOP holds per "
        "1,000 tokens"
    )


@fact("F06", "MQA: one KV head greatly reduces the KV cache")
def cache_ratio(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    mqa, mha = cache_numbers(model), cache_numbers(multi_head(model))
    row.exact("multi-head over multi-query", mha / mqa, model.num_attention_heads, "x")
    row.show("cache of a token, 16 bit", 2 * mqa, "bytes")
    return "2 L G C numbers per token: the ratio is the number of query heads"


@fact("F07", "16k and 32k are dear because KV memory caps the batch; 32k cannot run on 40 GB A100s, 8k is capped")
def batch_by_context(row: Draft) -> str:
    run = run_of("gpt4-1.8t-serve")
    cases = {
        (gpu, context, heads): largest_batch(model, run.serving, machine(gpu), context)
        for gpu in ("a100-40", "a100-80", "h100")
        for context in (8192, 16384, 32768)
        for heads, model in (("MQA", run.model), ("MHA", multi_head(run.model)))
    }
    for (gpu, context, heads), batch in cases.items():
        name = f"{gpu}, {context // 1024}k, {heads}"
        if gpu == "a100-40" and context == 32768 and heads == "MQA" and batch:
            row.contradiction(name, batch, "cannot run", "requests")
        else:
            row.show(name, batch, "requests")
    memory = serving_memory(run.model, run.serving, machine("a100-40"), batch=1, context=32768)
    room = cases["a100-40", 32768, "MQA"]
    return (
        f"what {run.serving.tp} x {run.serving.pp} GPUs hold beside {memory.weights / 1e9:.1f} GB of weights each; "
        f"with one KV head 32k fits 40 GB in batches up to {room} over all stages: too few to pay, but it runs"
    )


@fact("F08", "a 500B+ multi-head model at batch 512, context 2,048 needs 3 TB of KV cache, 3x its weights")
def large_cache(row: Draft) -> str:
    model = model_of("dense-500b")
    cache, weights = 512 * 2048 * cache_numbers(model) * 2, parameters(model).total * 2
    row.near("cache", cache, 3e12, "bytes", 0.05)
    row.bound("cache over weights", cache / weights, "3, to one digit", "x", round(cache / weights) == 3)
    H, L = model.num_attention_heads, model.num_hidden_layers
    return f"512 x 2,048 tokens x 2 x {L} layers x {H} heads x {model.head_dim} x 2 bytes (Pope et al. 2022, section 1)"
