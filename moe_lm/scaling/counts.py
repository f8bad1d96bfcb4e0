"""Parameters and FLOPs of a model from its config, in closed form.

D hidden width, F expert width, E experts, K experts per token, S shared experts, H query heads, G key-value heads,
C channels of a head, L layers, V vocabulary, T tokens of context.
"""

from dataclasses import dataclass

from moe_lm.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Number of weights by component."""

    embedding: int
    """The token table, V D."""
    attention: int
    """L (H + 2 G) C D for queries, keys and values, and L H C D for the output."""
    router: int
    """L E D."""
    mlp: int
    """All experts, routed and shared, or the dense MLPs: 3 D F each."""
    active_mlp: int
    """Those that one token passes through."""
    norms: int
    """(2 L + 1) D."""
    output: int
    """The projection to the vocabulary, V D; 0 when it is the token table."""

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.router + self.mlp + self.norms + self.output

    @property
    def active(self) -> int:
        """Weights that one token uses; of the token table it reads one row, but by custom the table counts whole."""
        return self.total - self.mlp + self.active_mlp


def parameters(config: ModelConfig) -> Parameters:
    """Weights of the model, equal to those of the built one."""
    D, L, C = config.hidden_size, config.num_hidden_layers, config.head_dim
    H, G, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    if config.is_moe:
        expert = 3 * D * config.expert_size
        mlp = (config.num_local_experts + config.n_shared_experts) * expert
        active = (config.num_experts_per_tok + config.n_shared_experts) * expert
    else:
        mlp = active = 3 * D * config.intermediate_size
    return Parameters(
        embedding=V * D,
        attention=L * (2 * H + 2 * G) * C * D,
        router=L * config.num_local_experts * D,
        mlp=L * mlp,
        active_mlp=L * active,
        norms=(2 * L + 1) * D,
        output=0 if config.tie_word_embeddings else V * D,
    )


def forward_flops_per_token(config: ModelConfig, context: float) -> float:
    """Multiplications and additions of one token's forward pass that attends to `context` tokens on average.

    Two per weight that multiplies it (the token table does not, the output projection does), and 4 L H C per token of
    context for scores and weighted values.
    """
    counts = parameters(config)
    matrices = counts.attention + counts.router + counts.active_mlp + config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return 2 * matrices + attention


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward (twice the forward) of one token in causal rows of `sequence_length`, no recomputation."""
    return 3 * forward_flops_per_token(config, (sequence_length + 1) / 2)
