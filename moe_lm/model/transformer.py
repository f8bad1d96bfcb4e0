"""The decoder: embed, then blocks of attention and MLP around a residual stream, then norm and project.

B rows of T tokens, N = B * T, D hidden width, V vocabulary, L layers, of which R route, E experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from moe_lm.config import ModelConfig, require
from moe_lm.model.attention import Attend, Attention, Rotation, whole_rows
from moe_lm.model.layers import Linear, RMSNorm, SwiGLU, rotary_angles
from moe_lm.model.moe import MoE, Routed, expert_counts, load_balancing_loss


@dataclass
class Losses:
    """What one batch costs, each term apart; means over the layers that route where a term has one for each."""

    nll: Tensor
    """Sum over scored targets of -log p, in nats, float32 scalar."""
    aux: Tensor
    """Load-balancing loss, 1 at balance; 0 for a dense model."""
    z: Tensor
    """Router z-loss; 0 for a dense model."""
    expert_counts: Tensor
    """Slots of scored tokens that each expert of each layer that routes got, before any is dropped, int64 (R, E);
    (0, 0) for a dense model."""
    router_entropy: Tensor
    """Mean entropy of the router's distribution, in nats, float32 (R,)."""
    router_confidence: Tensor
    """Mean over tokens of the largest probability of the router's distribution, float32 (R,)."""
    dropped: Tensor
    """Share of all slots that were dropped since their expert was full, float32 (R,)."""

    def router_loss(self, config: ModelConfig) -> Tensor:
        """The weighted router losses, which training adds to the mean cross-entropy."""
        return config.router_aux_loss_coef * self.aux + config.router_z_loss_coef * self.z


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.routes(layer) else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> tuple[Tensor, Routed | None]:
        attended = self.self_attn(self.input_layernorm(x), rotation, attend)
        normed, x = self.post_attention_layernorm.after_adding(attended, x)
        y, routed = self.mlp(normed) if isinstance(self.mlp, MoE) else (self.mlp(normed), None)
        return x + y, routed


def check_buildable(config: ModelConfig) -> None:
    """Raise ConfigError where `config` has a kind of block that `Transformer` does not compute."""
    planned = " and ".join(f"model.{name}" for name in config.only_planned)
    require(
        not planned,
        f"{planned} is counted and planned by moe_lm.scaling and not built by moe_lm.model: leave it out to build or "
        "train the rest.",
    )


class Transformer(nn.Module):
    """A GPT-4-shaped decoder. Weights are float32 until cast; `compute_dtype` is that of the activations.

    `compute_dtype` None follows the weights. With `checkpoint_blocks` the backward computes each block again from its
    input, which is all that is kept of it (Chen et al. 2016, section 3). Built under `torch.device("meta")` it costs no
    memory at any size. Raises ConfigError where `check_buildable` does.
    """

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype | None = None, checkpoint_blocks: bool = False
    ):  # fmt: skip
        super().__init__()
        check_buildable(config)
        self.config = config
        self.compute_dtype, self.checkpoint_blocks = compute_dtype, checkpoint_blocks
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """The projection to the vocabulary, (V, D)."""
        return self.embed_tokens if self.lm_head is None else self.lm_head.weight

    def reset_parameters(
        self, generator: torch.Generator | None = None, *, zero_residual: bool = False
    ) -> "Transformer":
        """Draw the initial weights: normal, those that write to the residual stream scaled by 1 / sqrt(2 L) (GPT-2).

        With `zero_residual` these are zero instead, and every block begins as the identity (Fixup, Zhang et al. 2019).
        """
        std = self.config.initializer_range
        residual_scale = 0.0 if zero_residual else 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
                nn.init.normal_(parameter, std=std * residual_scale if writes else std, generator=generator)
        for bias in self.router_biases:
            nn.init.zeros_(bias)
        return self

    @property
    def router_biases(self) -> list[Tensor]:
        """The biases that balance the layers that route, each float32 (E,); none without `router_bias_update_rate`."""
        layers = self.config.routing_layers if self.config.router_bias_update_rate else ()
        return [self.layers[layer].mlp.e_score_correction_bias for layer in layers]

    def update_router_biases(self, counts: Tensor) -> None:
        """`MoE.update_bias` of every layer that routes: once in an optimizer step, of all its micro-batches.

        counts int64 (R, E), the sum of their `Losses.expert_counts`.
        """
        for layer, of_layer in zip(self.config.routing_layers, counts, strict=True):
            self.layers[layer].mlp.update_bias(of_layer)

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, list[Routed]]:
        """Normed states (..., D) before the projection to the vocabulary, and the routing of each layer that routes.

        tokens and positions (...) int64 of one shape; `attend` as in moe_lm.model.attention.
        """
        # Rows of a table, gathered before they are rounded: casting the whole table would read V rows for N.
        x = nn.functional.embedding(tokens, self.embed_tokens).to(self.compute_dtype or self.embed_tokens.dtype)
        rotation = rotary_angles(self.config, positions.flatten())
        routings = []
        for block in self.layers:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # Random numbers of the router's jitter are drawn again, too: that is checkpoint's default.
                x, routed = checkpoint(block, x, rotation, attend, use_reentrant=False)
            else:
                x, routed = block(x, rotation, attend)
            if routed is not None:
                routings.append(routed)
        return self.norm(x), routings

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Logits float32 (..., V) of tokens int64 (...).

        By default (B, T) tokens are B rows from position 0, each token attending to the earlier ones of its row.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        x, _ = self.hidden_states(tokens, positions, attend or whole_rows())
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the vocabulary, float32 (..., V), for normed states (..., D)."""
        return nn.functional.linear(x, self.output_weight.to(x.dtype)).float()

    def losses(self, tokens: Tensor, targets: Tensor, positions: Tensor, documents: Tensor | None = None) -> Losses:
        """Training losses of packed rows; all arguments (B, T) int64, targets below 0 are not scored."""
        x, routings = self.hidden_states(tokens, positions, whole_rows(documents))
        nll = kernels.cross_entropy(x.flatten(0, -2), self.output_weight, targets.flatten())
        zero = nll.new_zeros(())
        if not routings:
            return Losses(nll, zero, zero, tokens.new_zeros(0, 0), *[nll.new_zeros(0)] * 3)
        rows = len(tokens) if self.config.seq_aux else 1
        scored = targets.flatten() >= 0
        found = [kernels.router_statistics(routed.logits, rows) for routed in routings]
        balances = [
            load_balancing_loss(each.probability, routed.routing.experts)
            for each, routed in zip(found, routings, strict=True)
        ]
        return Losses(
            nll,
            torch.stack(balances).mean(),
            torch.stack([each.z for each in found]).mean(),
            torch.stack([expert_counts(routed.routing, scored) for routed in routings]),
            torch.stack([each.entropy for each in found]),
            torch.stack([each.confidence for each in found]),
            torch.stack([zero if routed.dropped is None else routed.dropped for routed in routings]),
        )
