"""The mixture of experts: a router sends every token to its top-k MLPs. Dropless unless a capacity is asked for.

N tokens, D hidden width, F expert width, E experts, K experts per token. Nothing here has N * K * E elements.
"""

import math
from collections.abc import Callable
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
    """Which experts were chosen, with which weights: 0 where a slot was dropped."""
    dropped: Tensor | None = None
    """Share of the slots that were dropped, float32 scalar; None where there is no limit."""


class Experts(nn.Module):
    """All experts' weights as two tensors, gate rows before up rows."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, routing: kernels.Routing) -> Tensor:
        return kernels.expert_mlp(x, routing, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router, experts, and what all tokens share.

    With `router_bias_update_rate` the buffer `e_score_correction_bias`, float32 (E,), is part of the state; it stays
    float32 whatever the weights are cast to, since bfloat16 would lose its steps of 0.001 from 0.25 on.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.jitter = config.num_experts_per_tok, config.router_jitter_noise
        self.normalize, self.uniform = config.norm_topk_prob, config.uniform_routing
        self.capacity_factor, self.bias_update_rate = config.expert_capacity_factor, config.router_bias_update_rate
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config.num_local_experts, config.hidden_size, config.expert_size)
        shared = config.n_shared_experts * config.expert_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.num_local_experts) if self.bias_update_rate else None
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        """x (..., D) -> (..., D) and the router's decisions on the flattened tokens."""
        flat = x.flatten(0, -2)
        router_input = flat
        if self.training and self.jitter:
            noise = torch.empty_like(flat, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            router_input = flat.float() * noise
        logits = kernels.gate(router_input, self.gate.weight.float())
        if self.uniform:
            routing = uniform_routing(logits, self.top_k, self.normalize)
        else:
            routing = kernels.route(logits, self.top_k, self.e_score_correction_bias, self.normalize)
        dropped = None
        if self.training and self.capacity_factor:
            kept = within_capacity(routing, self.capacity_factor)
            routing = routing._replace(weights=routing.weights * kept)
            dropped = 1 - kept.float().mean()
        y = self.experts(flat, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape), Routed(logits, routing, dropped)

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """One step of auxiliary-loss-free balancing (Wang et al. 2024, algorithm 1), keeping the mean at 0.

        counts int64 (E,): the slots that each expert got in the whole optimizer step. Waits for no device.
        """
        # count < mean as E * count < sum: a mean in float32 would be off from 2^24 slots on.
        self.e_score_correction_bias += self.bias_update_rate * (counts.sum() - len(counts) * counts).sign()
        self.e_score_correction_bias -= self.e_score_correction_bias.mean()


def uniform_routing(logits: Tensor, top_k: int, normalize: bool) -> kernels.Routing:
    """Token n to the experts (n K + j) mod E, j from 0 to K - 1, weighed as `kernels.route` weighs what it chooses."""
    N, E = logits.shape
    every = torch.arange(E, device=logits.device)
    experts = (torch.arange(N * top_k, device=logits.device) % E).view(N, top_k)
    if normalize:
        weights = F.softmax(logits.gather(1, experts), dim=-1)
    else:
        weights = F.softmax(logits, dim=-1).gather(1, experts)
    counts = (N * top_k - every + E - 1) // E
    return kernels.Routing(
        weights, experts, torch.sort(experts.flatten(), stable=True).indices, F.pad(counts.cumsum(0), (1, 0))
    )


def within_capacity(routing: kernels.Routing, factor: float) -> Tensor:
    """Which slots the experts have room for, bool (N, K): of an expert's the first ceil(factor * N * K / E).

    First are those of earlier tokens in the batch (Switch Transformer, section 2.2, drops by position; GShard,
    algorithm 1, lets all first choices go before second ones, and Megatron-Core can keep the most probable). The rest
    have weight 0 and are computed all the same: this shows what dropping does, and is no speed-up.
    """
    slots, num_experts = routing.order.numel(), routing.offsets.numel() - 1
    starts = routing.offsets.gather(0, routing.experts.flatten()[routing.order])
    place = torch.empty_like(starts).index_copy_(
        0, routing.order, torch.arange(slots, device=starts.device) - starts
    )  # fmt: skip
    return (place < math.ceil(factor * slots / num_experts)).view_as(routing.experts)


def expert_counts(routing: kernels.Routing, scored: Tensor | None = None) -> Tensor:
    """Slots that each expert got, dropped or not, int64 (E,); those of the tokens in `scored`, bool (N,), if given."""
    if scored is None:
        return routing.offsets.diff()
    slots = scored.long().unsqueeze(1).expand_as(routing.experts).flatten()
    return routing.offsets.new_zeros(routing.offsets.numel() - 1).scatter_add_(0, routing.experts.flatten(), slots)


def load_balancing_loss(probability: Tensor, experts: Tensor) -> Tensor:
    """E * sum_e f_e P_e, f_e being expert e's share of the slots, P_e its mean probability (Switch Transformer, eq. 4).

    probability (rows, E) as of kernels.router_statistics, experts int64 (N, K). Of each part of the batch, and the mean
    of these (DeepSeek-V2, section 2.2.3). 1 when both are uniform, E when one expert takes everything. Slots count
    before any is dropped.
    """
    rows, E = probability.shape
    experts = experts.view(rows, -1)
    counts = experts.new_zeros(rows, E).scatter_add_(1, experts, torch.ones_like(experts))
    return E * (counts / experts.shape[1] * probability).sum(1).mean()
