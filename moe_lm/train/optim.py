"""The optimizer: AdamW with decoupled decay on matrices only."""

from torch import nn
from torch.optim import AdamW

from moe_lm.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019): one pass over weights, gradients and both moments.

    Norm weights do not decay: pulling a gain towards 0 only rescales what the next matrix learns.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
