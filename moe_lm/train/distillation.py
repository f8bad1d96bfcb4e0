"""Distillation: a draft learns its target's distribution beside the text (Hinton et al. 2015; DistillSpec, Zhou et al.
2024), so that more of its guesses stand. A guess stands with probability 1 - TV, the total variation between the two
distributions that are sampled (Leviathan et al. 2023, corollary 3.6).

B rows of T tokens, N = B * T, D hidden width of the draft, C of the target, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lm.config import ModelConfig, RunConfig, require
from moe_lm.data import Batch
from moe_lm.model import Losses, Transformer
from moe_lm.model.attention import whole_rows

CHUNK = 1024
"""Rows whose float32 logits exist at once: at a vocabulary of 4,096 each of the arrays takes 16 MiB. A step of the nano
draft took 0.76 to 0.91 of that with chunks of 256, and 0.90 of that with 2,048 (2 cores)."""


@dataclass
class DistillationLosses(Losses):
    """`Losses`, and how far the draft is from its target; sums over scored targets, float32 scalars."""

    total: Tensor
    """What is trained on: cross-entropy and divergence, weighted."""
    acceptance: Tensor
    """1 - TV: the share of guesses that stand when both are sampled at temperature 1."""


def check_distillation(config: RunConfig, target: ModelConfig | None) -> None:
    """Raise ConfigError where `train.distillation` cannot work: no target, another vocabulary, a draft with experts."""
    distillation, model = config.train.distillation, config.model
    if distillation == 0:
        return
    setting = f"train.distillation = {distillation}"
    require(target is not None, f"{setting} needs a target: train this as the draft of another config, or set it to 0.")
    require(
        target.vocab_size == model.vocab_size,
        f"{setting} needs one vocabulary, and the target's vocab_size = {target.vocab_size} is not the draft's "
        f"{model.vocab_size}: make them equal, or set it to 0.",
    )
    require(
        not model.is_moe,
        f"{setting} needs a dense draft, and model.num_local_experts = {model.num_local_experts}: set either to 0.",
    )


def distillation_losses(
    draft: Transformer, target: Transformer, batch: Batch, distillation: float
) -> DistillationLosses:
    """Losses of packed rows, whose total is (1 - distillation) * cross-entropy + distillation * KL(target || draft).

    Gradients reach the draft alone. The target should be in evaluation mode.
    """
    with torch.inference_mode():
        target_x, _ = target.hidden_states(batch.tokens, batch.positions, whole_rows(batch.documents))
    x, _ = draft.hidden_states(batch.tokens, batch.positions, whole_rows(batch.documents))
    total, nll, acceptance = FusedDistillation.apply(
        x.flatten(0, -2), draft.output_weight, target_x.flatten(0, -2), target.output_weight,
        batch.targets.flatten(), distillation,
    )  # fmt: skip
    zero = nll.new_zeros(())
    return DistillationLosses(
        nll, zero, zero, batch.tokens.new_zeros(0, 0), *[nll.new_zeros(0)] * 3, total, acceptance
    )  # fmt: skip


class FusedDistillation(torch.autograd.Function):
    """Both projections and the loss together, a chunk of rows at a time, the gradients made in the same pass.

    Arguments: x (N, D), weight (V, D), target_x (N, C), target_weight (V, C), targets (N,) int64, of which those below
    0 are not scored, and the weight of the divergence. Returns the total, of which alone there is a gradient, the
    cross-entropy and the acceptance, as `DistillationLosses` has them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target_x: Tensor, target_weight: Tensor, targets: Tensor,
        distillation: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        w, target_w = weight.to(x.dtype), target_weight.to(target_x.dtype)
        nll = torch.zeros((), dtype=torch.float32, device=x.device)
        divergence, acceptance = nll.clone(), nll.clone()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            chosen = targets[chunk]
            unscored = chosen < 0
            index = chosen.clamp(min=0)[:, None]
            log_q = torch.log_softmax((x[chunk] @ w.t()).float(), dim=1)
            log_p = torch.log_softmax((target_x[chunk] @ target_w.t()).float(), dim=1)
            p, q = log_p.exp(), log_q.exp()
            # An unscored row is overwritten, not multiplied by 0, which would let its NaN through.
            nll -= log_q.gather(1, index).masked_fill_(unscored[:, None], 0.0).sum()
            divergence += log_p.sub_(log_q).mul_(p).sum(1).masked_fill_(unscored, 0.0).sum()
            difference = torch.sub(q, p, out=p)
            overlap = 1 - torch.linalg.vector_norm(difference, 1, dim=1) / 2
            acceptance += overlap.masked_fill_(unscored, 0.0).sum()
            # distillation * (q - p) + (1 - distillation) * (q - the token that came)
            grad_logits = difference.lerp_(q, 1 - distillation) if distillation < 1 else difference
            grad_logits.scatter_add_(1, index, q.new_full((), distillation - 1).expand_as(index))
            grad_logits = grad_logits.masked_fill_(unscored[:, None], 0.0).to(x.dtype)
            grad_x[chunk] = grad_logits @ w
            grad_weight += grad_logits.t() @ x[chunk].masked_fill(unscored[:, None], 0.0)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(nll, acceptance)
        return (1 - distillation) * nll + distillation * divergence, nll, acceptance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None
