"""The optimizer: which rule, rate and decay each weight gets."""

import torch
from torch import Tensor
from torch.optim import AdamW

from moe_lm.config import ModelConfig, TrainConfig
from moe_lm.model import Transformer
from moe_lm.train.muon import NEWTON_SCHULZ_STEPS, MuonAdamW


def make_optimizer(model: Transformer, config: TrainConfig, dtype: torch.dtype = torch.float32) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused, or with `config.optimizer` muon that for what Muon does not suit.

    Muon takes the matrices of the blocks. The router's stays with AdamW, as do the token table and the projection to
    the vocabulary, whose rows each meet few tokens. Norm weights do not decay: pulling a gain towards 0 only rescales
    what the next matrix learns. Each group carries `lr_ratio`, its learning rate as a multiple of the schedule's.
    `dtype` is that of Muon's own products.
    """
    decay, muon = config.weight_decay, config.optimizer == "muon"
    matrices = {"weight_decay": decay, "lr_ratio": 1.0, "muon": False}
    orthogonal = {
        "weight_decay": decay, "lr_ratio": config.muon_learning_rate / config.learning_rate, "muon": True,
        "momentum": config.muon_momentum, "ns_steps": NEWTON_SCHULZ_STEPS, "every": 1,
    }  # fmt: skip
    of_experts = {"ns_steps": config.expert_ns_steps, "every": config.expert_muon_every}
    groups: dict[str, dict] = {
        "matrices": matrices,
        "table": matrices | {"lr_ratio": config.embedding_learning_rate_ratio},
        "gains": matrices | {"weight_decay": 0.0},
        "blocks": dict(orthogonal if muon else matrices),
        "experts": orthogonal | of_experts if muon else dict(matrices),
    }
    groups["experts"]["lr_ratio"] *= config.expert_learning_rate_ratio
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            group = groups["gains"]
        elif parameter is model.embed_tokens:
            group = groups["table"]
        elif name.startswith("layers.") and not name.endswith("mlp.gate.weight"):
            group = groups["experts" if ".mlp.experts." in name else "blocks"]
        else:
            group = groups["matrices"]
        group.setdefault("params", []).append(parameter)
        if group["muon"]:
            group.setdefault("rows", []).append(matrix_rows(name, parameter, model.config))
    betas = (config.beta1, config.beta2)
    chosen = [group for group in groups.values() if "params" in group]
    return MuonAdamW(chosen, dtype, lr=config.learning_rate, betas=betas, eps=config.adam_eps)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of them all, a float32 scalar.

    On a CPU row by row first: torch's norm of a whole tensor sums up one long chain in float32, which came out 5e-4 too
    small at 213M numbers, and took 1.45 times as long.
    """
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.linalg.vector_norm(torch.cat(rows))


def matrix_rows(name: str, parameter: Tensor, config: ModelConfig) -> list[int]:
    """Rows of each of the matrices that the weight `name` is made of."""
    if name.endswith("qkv_proj.weight"):
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        return [queries, keys, keys]
    rows = parameter.shape[-2]
    return [rows // 2] * 2 if "gate_up_proj" in name else [rows]
