"""The optimizer: AdamW with decoupled decay on matrices only."""

from torch.optim import AdamW

from moe_lm.config import TrainConfig
from moe_lm.model import Transformer


def make_optimizer(model: Transformer, config: TrainConfig) -> AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019): one pass over weights, gradients and both moments.

    Norm weights do not decay: pulling a gain towards 0 only rescales what the next matrix learns. Each group carries
    `lr_ratio`, its learning rate as a multiple of the schedule's.
    """
    table = model.embed_tokens
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1 and parameter is not table]
    gains = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": [table], "weight_decay": config.weight_decay, "lr_ratio": config.embedding_learning_rate_ratio},
        {"params": gains, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
