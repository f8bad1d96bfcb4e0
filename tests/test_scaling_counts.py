"""Parameters and FLOPs in closed form against our own models, built on the meta device at full size."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from moe_lm.config import ModelConfig
from moe_lm.model import Transformer
from moe_lm.model.moe import MoE
from moe_lm.scaling.counts import forward_flops_per_token, layer_parameters, parameters, train_flops_per_token
from moe_lm.toml import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = {
    path.stem: model for path in sorted(CONFIGS.glob("*.toml")) if not (model := load_config(path).model).only_planned
}
LAYOUTS = FILES | {
    "default": ModelConfig(),
    "dense": ModelConfig(num_local_experts=0),
    "tied": ModelConfig(tie_word_embeddings=True),
    "grouped": ModelConfig(num_key_value_heads=4),
    "wide heads": ModelConfig(head_dim=50, num_key_value_heads=2),
    "shared experts": ModelConfig(n_shared_experts=2, num_experts_per_tok=6, num_local_experts=64),
    "narrow experts": ModelConfig(moe_intermediate_size=96, n_shared_experts=1),
    "first layer dense": ModelConfig(first_k_dense_replace=1, moe_intermediate_size=96, n_shared_experts=1),
    "every second layer dense": ModelConfig(expert_layer_period=2, expert_layer_offset=1),
}
PARTS = {
    "embedding": "embed_tokens", "output": "lm_head", "norms": "norm", "attention": "self_attn",
    "router": "mlp.gate.", "shared_experts": "mlp.shared_experts", "experts": "mlp.experts", "dense_mlp": "mlp.",
}  # fmt: skip
"""What the names of a component's weights hold; the first that fits counts."""


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_counted_parameters_are_those_of_the_built_model(name):
    config = LAYOUTS[name]
    model = on_meta(config)
    built = dict.fromkeys(PARTS, 0)
    for parameter_name, parameter in model.named_parameters():
        built[next(part for part, mark in PARTS.items() if mark in parameter_name)] += parameter.numel()
    counts = parameters(config)
    assert built == {part: getattr(counts, part) for part in PARTS}
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    for layer, block in enumerate(model.layers):
        assert layer_parameters(config, layer).total == sum(parameter.numel() for parameter in block.parameters())
    routing = [block.mlp for block in model.layers if isinstance(block.mlp, MoE)]
    each = sum(weight[0].numel() for weight in routing[0].experts.parameters()) if routing else 0
    idle = len(routing) * (config.num_local_experts - config.num_experts_per_tok) * each
    assert counts.active == counts.total - idle


def test_the_full_size_layout_has_the_reported_totals():
    counts = parameters(LAYOUTS["gpt4-1.8t"])
    assert counts.mlp / 16 == pytest.approx(109.5e9, rel=1e-3)
    assert counts.attention == pytest.approx(55.19e9, rel=1e-3)
    assert counts.embedding + counts.output == pytest.approx(2.98e9, rel=1e-3)
    assert counts.total == pytest.approx(1.810e12, rel=1e-3)
    assert counts.active == pytest.approx(277.1e9, rel=1e-3)


def test_the_dense_baseline_has_the_active_parameters_of_nano():
    sparse, dense = (parameters(LAYOUTS[name]) for name in ("nano", "nano-dense"))
    assert LAYOUTS["nano"].is_moe
    assert not LAYOUTS["nano-dense"].is_moe
    assert dense.total == dense.active == sparse.active - sparse.router


@pytest.mark.parametrize("name", FILES)
def test_flops_are_those_that_torch_counts_in_our_model(name):
    # Eight layers of each, for the test to be short: the others are like them.
    config = dataclasses.replace(FILES[name], num_hidden_layers=min(8, FILES[name].num_hidden_layers))
    if config.is_moe:  # the reference sends every token to all experts, so here all of them are active
        config = dataclasses.replace(config, num_experts_per_tok=config.num_local_experts)
    model, length = on_meta(config), 4
    with torch.no_grad(), kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64, device="meta"))
    # The reference multiplies whole squares of scores.
    assert counter.get_total_flops() == length * forward_flops_per_token(config, context=length)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 0},
        {"num_local_experts": 0, "num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True},
        # The reference sends every token to all experts, so here all of them are active.
        {"num_local_experts": 4, "num_experts_per_tok": 4, "n_shared_experts": 1},
    ],
)
def test_flops_of_training_are_those_that_torch_counts(changes):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    config, count, length = ModelConfig(**sizes, num_attention_heads=4, **changes), 3, 16
    model, tokens = on_meta(config), torch.zeros(count, length, dtype=torch.int64, device="meta")
    with kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        losses = model.losses(tokens, tokens, tokens)
        (losses.nll + losses.router_loss(config)).backward()
    counted = counter.get_total_flops() / (count * length)
    # The reference multiplies whole squares of scores, the formula counts what is causal.
    assert counted == 3 * forward_flops_per_token(config, context=length)
    causal = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length - 1) / 2
    assert train_flops_per_token(config, length) == counted - causal
