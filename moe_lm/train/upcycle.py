"""Upcycling: a mixture that starts as the dense model it was made from, to be trained on (Komatsuzaki et al. 2023).

Experts as wide as the dense MLP are copies of it, and any weights that sum to 1 give its output. Narrower ones are
shards of it: of G shards the first S are the shared experts and the other R = G - S are routed, in E / R groups of one
expert for each shard (the virtual groups of He et al. 2024). The experts of a group have one row of the router between
them at the start, so a token's top-k is K / R whole groups, and a group whose weight is p gives every shard p / R:
with the routed shards' output times R the sum over groups of p times the dense output is the dense output.

G shards of the dense MLP, S shared, R routed; E experts, K experts per token, D hidden width, F expert width.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe_lm.checkpoint.hf import load, read_config, resolve_model_dir
from moe_lm.config import ConfigError, ModelConfig, RunConfig, require
from moe_lm.model import Transformer
from moe_lm.model.layers import SwiGLU
from moe_lm.model.moe import MoE

SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")  # fmt: skip
"""What the mixture has in common with the dense model, beside the width of its dense layers."""


def check_upcycling(config: RunConfig) -> None:
    """Raise ConfigError where `train.upcycle` cannot start `config.model` with the outputs of the dense model."""
    if config.train.upcycle is None:
        return
    source, model = f"train.upcycle = {config.train.upcycle}", config.model
    try:
        dense = read_config(resolve_model_dir(config.train.upcycle))
    except ConfigError as error:
        raise ConfigError(f"train.upcycle: {error}") from None
    require(not dense.is_moe, f"{source} is a mixture of {dense.num_local_experts} experts: name a dense model.")
    require(bool(model.routing_layers), f"{source} needs a mixture to start: set model.num_local_experts above 0.")
    differ = [name for name in SAME if getattr(model, name) != getattr(dense, name)]
    there, here = (" and ".join(f"{name} = {getattr(each, name)}" for name in differ) for each in (dense, model))
    require(not differ, f"{source} has {there}, and this run model.{here}: make them equal.")
    mixed = len(model.routing_layers) < model.num_hidden_layers
    require(
        not mixed or model.intermediate_size == dense.intermediate_size,
        f"{source} has intermediate_size = {dense.intermediate_size}, and the dense layers of this run "
        f"model.intermediate_size = {model.intermediate_size}: make them equal.",
    )
    check_shards(source, dense.intermediate_size, model)


def check_shards(source: str, width: int, model: ModelConfig) -> None:
    """Raise ConfigError where experts of `model` cannot be shards of an MLP of `width` that add up to it."""
    size, shared = model.expert_size, model.n_shared_experts
    require(
        width % size == 0,
        f"{source} has MLPs of width {width}, and the experts' width is {size}: set model.moe_intermediate_size to "
        f"{width} divided by a whole number.",
    )
    shards = width // size
    require(
        shared < shards,
        f"{source} has MLPs of width {width}, {shards} times the experts' {size}, and model.n_shared_experts = "
        f"{shared} leaves no shard to route: set it below {shards}, or narrow the experts.",
    )
    for name in ("num_experts_per_tok", "num_local_experts"):
        require(
            getattr(model, name) % (shards - shared) == 0,
            f"model.{name} = {getattr(model, name)} must be a multiple of {shards - shared}, the routed experts that "
            f"are one MLP of {source}: its width {width} is {shards} times the experts' {size}"
            + (f", of which {shared} are shared." if shared else "."),
        )
    require(
        model.norm_topk_prob or model.num_experts_per_tok == model.num_local_experts,
        f"{source} needs weights of the chosen experts that sum to 1, and model.norm_topk_prob = false: set it "
        "to true.",
    )


@torch.no_grad()
def upcycle(model: Transformer, path: str | Path) -> None:
    """Put the weights of the dense model at `path` into the mixture `model`, in place; its routers stay as drawn.

    The experts of a group take the router's row of their first. `check_upcycling` has seen the two configs.
    """
    dense = load(path, dtype=torch.float32, device=model.embed_tokens.device)
    mixtures = tuple(f"layers.{layer}.mlp." for layer in model.config.routing_layers)
    source = dense.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(mixtures):
            tensor.copy_(source[name])
    for layer in model.config.routing_layers:
        fill(model.layers[layer].mlp, dense.layers[layer].mlp, model.config)


def fill(mixture: MoE, mlp: SwiGLU, config: ModelConfig) -> None:
    """The shards of one dense MLP as the experts of one layer."""
    size, shared = config.expert_size, config.n_shared_experts
    gate_up = mlp.gate_up_proj.weight.unflatten(0, (2, -1, size))  # (2, G, F, D): gate rows first
    down = mlp.down_proj.weight.unflatten(1, (-1, size)).transpose(0, 1)  # (G, D, F)
    routed = len(down) - shared
    groups = config.num_local_experts // routed
    experts = mixture.experts
    experts.gate_up_proj.copy_(gate_up[:, shared:].transpose(0, 1).flatten(1, 2).repeat(groups, 1, 1))
    experts.down_proj.copy_(routed * down[shared:].repeat(groups, 1, 1))
    rows: Tensor = mixture.gate.weight.unflatten(0, (groups, routed))
    rows.copy_(rows[:, :1].clone().expand_as(rows))
    if mixture.shared_experts is not None:
        mixture.shared_experts.gate_up_proj.weight.copy_(gate_up[:, :shared].flatten(0, 2))
        mixture.shared_experts.down_proj.weight.copy_(down[:shared].transpose(0, 1).flatten(1))
