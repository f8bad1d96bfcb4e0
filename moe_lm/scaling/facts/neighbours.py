"""Facts of the systems beside it: F50 to F58.

D hidden width, S tokens of a sequence.
"""

from dataclasses import replace

from moe_lm.config import ModelConfig
from moe_lm.scaling.configs import model_of, run_of
from moe_lm.scaling.counts import cache_numbers, forward_flops_per_token, parameters
from moe_lm.scaling.facts.row import Draft, fact

MIB, GIB = 2**20, 2**30


@fact("F50", "Llama-2-7B and Llama-3-8B: 6.74B and 8.03B; where the difference comes from")
def llamas(row: Draft) -> str:
    older, newer = model_of("llama-2-7b"), model_of("llama-3-8b")
    row.near("Llama-2-7B", parameters(older).total, 6.74e9, "parameters", 0.001)
    row.near("Llama-3-8B", parameters(newer).total, 8.03e9, "parameters", 0.001)
    steps = (
        ("vocabulary", "vocab_size", 1504), ("KV heads", "num_key_value_heads", -1536),
        ("MLP", "intermediate_size", 2496),
    )  # fmt: skip
    model, before = older, parameters(older).total
    for name, field, reported in steps:
        model = replace(model, **{field: getattr(newer, field)})
        after = parameters(model).total
        row.exact(name, (after - before) * 2 / MIB, float(reported), "MiB in bfloat16")
        before = after
    net = (parameters(newer).total - parameters(older).total) * 2 / MIB
    row.exact("net", net, 2464.0, "MiB in bfloat16")
    return "one field of the config changed after another; 2 bytes per parameter"


@fact("F51", "Mistral-7B 7.24B; Mixtral-8x7B 46.7B total, 12.9B active")
def mixtral(row: Draft) -> str:
    row.near("Mistral-7B", parameters(model_of("mistral-7b")).total, 7.24e9, "parameters", 0.001)
    counts = parameters(model_of("mixtral-8x7b"))
    row.near("Mixtral-8x7B", counts.total, 46.7e9, "parameters", 0.001)
    row.near("active", counts.active, 12.9e9, "parameters", 0.005)
    return "8 experts in place of each MLP, 2 per token"


@fact("F52", "DeepSeekMoE-16B: 16.4B total, 2.8B active, about 40% of Llama-2-7B's compute")
def deepseek(row: Draft) -> str:
    counts = parameters(model_of("deepseek-moe-16b"))
    row.near("total", counts.total, 16.4e9, "parameters", 0.005)
    row.near("active", counts.active, 2.8e9, "parameters", 0.015)
    context = 4096 / 2
    ours, theirs = (forward_flops_per_token(model_of(name), context) for name in ("deepseek-moe-16b", "llama-2-7b"))
    row.near("compute of Llama-2-7B", ours / theirs, 0.40, "of its FLOP per token", 0.05)
    return "64 experts of width 1,408, 6 per token and 2 shared; the first layer dense; rows of 4,096 tokens"


@fact("F53", "Jamba-52B: Mamba : attention 7 : 1, MoE every other layer, 16 experts top-2; 12B active")
def jamba(row: Draft) -> str:
    model = model_of("jamba-52b")
    counts = parameters(model)
    row.near("total", counts.total, 52e9, "parameters", 0.01)
    row.near("active", counts.active, 12e9, "parameters", 0.01)
    attending = sum(model.attends(layer) for layer in range(model.num_hidden_layers))
    routing = sum(model.routes(layer) for layer in range(model.num_hidden_layers))
    row.exact("Mamba layers per layer with attention", (model.num_hidden_layers - attending) / attending, 7.0, "layers")
    row.exact("layers per layer that routes", model.num_hidden_layers / routing, 2.0, "layers")
    return "counted in closed form, equal to transformers' own class; the Mamba layers are planned, not built here"


@fact("F54", "KV cache at 256k tokens, 16 bit: Llama-2-7B 128 GiB, Mistral-7B 32 GiB, Jamba 4 GiB")
def caches(row: Draft) -> str:
    for name, reported in (("llama-2-7b", 128.0), ("mistral-7b", 32.0), ("jamba-52b", 4.0)):
        row.exact(name, 256 * 1024 * cache_numbers(model_of(name)) * 2 / GIB, reported, "GiB")
    return "2 x layers with attention x KV heads x channels x 2 bytes x 262,144 tokens; no sliding window"


@fact("F55", "GPT-3 175B: 174.6B, 96 layers (one report says 12)")
def gpt3(row: Draft) -> str:
    model = model_of("gpt3-175b")
    row.near("total", parameters(model).total, 174.6e9, "parameters", 0.001)
    row.exact("layers", model.num_hidden_layers, 96, "layers")
    D = model.hidden_size
    small = parameters(replace(model, num_hidden_layers=12)).total
    row.contradiction("layers in one of the reports", 96, 12, "layers")
    return f"a block has about 12 D^2 weights, D = {D:,}: 12 layers would be {small / 1e9:.1f}B"


@fact(
    "F56", "attention 4 S D^2 + 2 S^2 D multiply-adds, MLP 8 S D^2: the quadratic term passes the rest when S is large"
)
def quadratic(row: Draft) -> str:
    model = model_of("gpt3-175b")
    D, L = model.hidden_size, model.num_hidden_layers
    S = 2048
    matrices, scores = layer_multiplies(model, S)
    row.exact("matrices of a layer over S D^2", matrices / (S * D * D), 12.0, "multiply-adds")
    row.exact("scores of a layer over S^2 D", scores / (S * S * D), 2.0, "multiply-adds")
    row.exact("crossing, 12 S D^2 = 2 S^2 D", (matrices / S) / (scores / S**2), 6.0 * D, "tokens")
    row.show("crossing if the masked half of the scores is skipped", 12 * D, "tokens")
    return (
        f"S = 6 D: {6 * D:,} tokens for GPT-3 (D = {D:,}, {L} layers); with 8k it is {8192 / (6 * D):.0%} of the rest"
    )


def layer_multiplies(model: ModelConfig, S: int) -> tuple[float, float]:
    """Multiply-adds of one layer over S tokens: its matrices, and attention's scores and values over all pairs."""
    one = replace(model, num_hidden_layers=1)
    output = model.vocab_size * model.hidden_size
    matrices = S * (forward_flops_per_token(one, 0) / 2 - output)
    return matrices, S * (forward_flops_per_token(one, S) - forward_flops_per_token(one, 0)) / 2


@fact(
    "F57",
    "vision: encoder + gated cross-attention, fine-tuned on about 2T tokens; 600 bytes per image token: 150x text",
)
def vision(row: Draft) -> str:
    run = run_of("gpt4-1.8t-vision")
    row.exact("bytes of an image token over those of text", 600 / 4, 150.0, "x")
    counts, pixels = parameters(run.model), 3 * run.model.vision.patch_size**2
    row.show("bytes of a patch in the config, 8 bits a channel", pixels, "bytes", reported=600)
    row.near("tokens of the fine-tune", run.train.steps * run.train.batch_tokens, 2e12, "tokens", 0.01)
    row.show("encoder", counts.vision_encoder, "parameters")
    row.show("gated cross-attention", counts.cross_attention, "parameters")
    return "600 / 4; planned and counted, not built: the sizes of encoder and cross-attention are not reported"


@fact("F58", "64-128 experts lose less than 16 in research, but generalise and converge less easily")
def expert_sweep(row: Draft) -> str:
    model = model_of("gpt4-1.8t")
    active = parameters(model).active - parameters(model).router
    for experts in (2, 4, 8, 16, 32, 64, 128):
        counts = parameters(replace(model, num_local_experts=experts))
        assert counts.active - counts.router == active, experts
        row.show(f"{experts} experts, top-2", counts.total, "parameters")
    return "the same FLOP per token but for the router; 128 experts of this width are 8 times the GPUs to hold them"
