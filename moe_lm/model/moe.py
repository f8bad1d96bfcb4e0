"""The mixture of experts: a router sends every token to its top-k MLPs. Dropless.

N tokens, D hidden width, F expert width, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from moe_lm.config import ModelConfig
from moe_lm.model.layers import Linear, SwiGLU


class Routed(NamedTuple):
    """What one layer's router did."""

    logits: Tensor
    """(N, E) float32."""
    routing: kernels.Routing
    """Which experts were chosen, with which weights."""


class Experts(nn.Module):
    """All experts' weights as two tensors, gate rows before up rows."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, routing: kernels.Routing) -> Tensor:
        return kernels.expert_mlp(x, routing, self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype))


class MoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.jitter = config.num_experts_per_tok, config.router_jitter_noise
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config.num_local_experts, config.hidden_size, config.expert_size)
        shared = config.n_shared_experts * config.expert_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        """x (..., D) -> (..., D) and the router's decisions on the flattened tokens."""
        flat = x.flatten(0, -2)
        # The router works in float32: rounding its logits flips choices (Switch Transformer, section 2.4).
        router_input = flat.float()
        if self.training and self.jitter:
            router_input = router_input * torch.empty_like(router_input).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.gate(router_input)
        routing = kernels.route(logits, self.top_k)
        y = self.experts(flat, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape), Routed(logits, routing)


def expert_counts(routing: kernels.Routing) -> Tensor:
    """Slots that each expert got, int64 (E,)."""
    return routing.offsets.diff()


def load_balancing_loss(routed: Routed) -> Tensor:
    """E * sum_e f_e P_e, f_e being expert e's share of the slots, P_e its mean probability (Switch Transformer, eq. 4).

    1 when both are uniform, E when one expert takes everything.
    """
    counts = expert_counts(routed.routing)
    share = counts / counts.sum()
    probability = F.softmax(routed.logits, dim=-1).mean(0)
    return len(counts) * (share * probability).sum()


def router_z_loss(routed: Routed) -> Tensor:
    """Mean of (log sum exp logits)^2 (ST-MoE, eq. 5)."""
    return routed.logits.logsumexp(dim=-1).square().mean()


def router_entropy(routed: Routed) -> Tensor:
    """Mean over tokens of the entropy of the router's distribution over all experts, in nats: 0 to log E."""
    log_p = F.log_softmax(routed.logits.detach(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
