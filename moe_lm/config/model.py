"""The shape of a model, in the names of Hugging Face's config.json."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_lm.config.errors import require, require_positive


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on."""

    rope_type: Literal["linear", "llama3"] = "linear"
    """`linear` divides every frequency by `factor` (Chen et al. 2023); `llama3` only the slow ones (Llama 3.1)."""
    factor: float = 1.0
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: int = 8192
    """llama3: the context length of the model before scaling, in tokens."""

    def __post_init__(self):
        require(self.factor >= 1, f"rope_scaling.factor = {self.factor} must be at least 1.")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"rope_scaling.high_freq_factor = {self.high_freq_factor} must be above "
            f"low_freq_factor = {self.low_freq_factor}, which must be above 0.",
        )
        require_positive(self, "original_max_position_embeddings", section="rope_scaling.")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): counted and planned, not built by `moe_lm.model`."""

    kv_lora_rank: int
    """Width of the compressed keys and values, which are what the cache holds."""
    qk_nope_head_dim: int
    """Channels of a head that carry no position."""
    qk_rope_head_dim: int
    """Channels of a head that are rotated; their key is one for all heads, and cached."""
    v_head_dim: int
    """Channels of a head's values."""
    q_lora_rank: int = 0
    """Width of the compressed queries; 0 projects queries at once."""

    def __post_init__(self):
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        require_positive(self, *names, section="model.mla.")
        require(self.q_lora_rank >= 0, f"model.mla.q_lora_rank = {self.q_lora_rank} must be 0 (none) or more.")


@dataclass(frozen=True)
class Mamba:
    """Layers of a selective state space (Gu and Dao 2023) in place of attention, as in Jamba (Lieber et al. 2024).

    Counted and planned, not built by `moe_lm.model`. Layer i has attention where i % attn_layer_period ==
    attn_layer_offset, else Mamba.
    """

    attn_layer_period: int = 8
    """Layers from one with attention to the next."""
    attn_layer_offset: int = 4
    """The first layer with attention."""
    d_state: int = 16
    """States per channel."""
    d_conv: int = 4
    """Width of the causal convolution."""
    expand: int = 2
    """Inner width as a multiple of hidden_size."""
    dt_rank: int = 256
    """Rank of the projection that gives the step sizes."""

    def __post_init__(self):
        names = ("attn_layer_period", "d_state", "d_conv", "expand", "dt_rank")
        require_positive(self, *names, section="model.mamba.")
        require(
            0 <= self.attn_layer_offset < self.attn_layer_period,
            f"model.mamba.attn_layer_offset = {self.attn_layer_offset} must be from 0 to below attn_layer_period = "
            f"{self.attn_layer_period}.",
        )


@dataclass(frozen=True)
class VisionEncoder:
    """A vision transformer and gated cross-attention to what it saw, added to a trained decoder.

    After Flamingo (Alayrac et al. 2022, section 2.2). Counted and planned, not built by `moe_lm.model`.
    Before every `cross_attention_period`-th layer of the decoder, first before layer 0, stands a block of
    cross-attention with its own MLP, each behind a learned gate.
    """

    hidden_size: int
    """Width of the encoder."""
    intermediate_size: int
    """Hidden width of its MLPs, GELU without a gate."""
    num_hidden_layers: int
    """Blocks of the encoder."""
    image_size: int
    """Pixels on a side of the square image."""
    patch_size: int
    """Pixels on a side of a patch; an image has (image_size / patch_size)^2 tokens."""
    cross_attention_period: int = 4
    """Layers of the decoder from one block of cross-attention to the next."""
    cross_attention_intermediate_size: int = 0
    """Hidden width of the MLP in a block of cross-attention, without a gate; 0 is 4 hidden_size, as in Flamingo."""

    def __post_init__(self):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size",
                 "cross_attention_period")  # fmt: skip
        require_positive(self, *names, section="model.vision.")
        require(
            self.image_size % self.patch_size == 0,
            f"model.vision.image_size = {self.image_size} is not a multiple of patch_size = {self.patch_size}.",
        )
        width = self.cross_attention_intermediate_size
        require(width >= 0, f"model.vision.cross_attention_intermediate_size = {width} must be 0 or more.")

    @property
    def image_tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. With every router option at its default it is Mixtral with one key-value head."""

    vocab_size: int = 4096
    """Rows of the embedding: at least the tokenizer's vocabulary; a multiple of 128 keeps GPU tiles full."""
    hidden_size: int = 256
    """Width of the residual stream (d_model)."""
    intermediate_size: int = 512
    """Hidden width of the SwiGLU MLP; in a mixture, of each expert unless `moe_intermediate_size` says otherwise."""
    num_hidden_layers: int = 4
    """Number of blocks, each attention then MLP."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 1
    """Key-value heads: 1 is multi-query (MQA), `num_attention_heads` is multi-head, in between is grouped (GQA)."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads if not given."""
    max_position_embeddings: int = 1024
    """Longest context in tokens that a cache is sized for and a request may fill."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (Su et al. 2021)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; none by default."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding itself."""
    num_local_experts: int = 16
    """Routed experts per layer; 0 makes every MLP dense."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to (top-k)."""
    moe_intermediate_size: int | None = None
    """Hidden width of each expert where it differs from `intermediate_size`."""
    n_shared_experts: int = 0
    """Experts that see every token beside the routed ones (DeepSeekMoE, section 3.2), each of the experts' width."""
    first_k_dense_replace: int = 0
    """First layers whose MLP is dense, of `intermediate_size`, where the others route (DeepSeekMoE, section 4.1.2)."""
    expert_layer_period: int = 1
    """From layer `expert_layer_offset` on, every so many layers route and the others are dense (Jamba: 2)."""
    expert_layer_offset: int = 0
    """The first layer that routes, where not all do."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, section 2.2) in the training loss."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss (ST-MoE, section 3.2), which keeps router logits small."""
    router_jitter_noise: float = 0.0
    """Training only: router inputs are multiplied by uniform noise in [1 - j, 1 + j] (Switch Transformer)."""
    norm_topk_prob: bool = True
    """Whether a token's weights are a softmax over its chosen experts' logits, so that they sum to 1 (Mixtral); else
    they are theirs in the softmax over all experts (Switch Transformer, section 2.1; OLMoE)."""
    seq_aux: bool = False
    """Load-balancing loss of every row of a batch by itself, and their mean (DeepSeek-V2, section 2.2.3), in place of
    one over the whole batch."""
    router_bias_update_rate: float = 0.0
    """Above 0: each expert has a bias that counts when experts are chosen and never weighs; after a training step it
    moves by this much, up if its load is below the mean, down if above (auxiliary-loss-free balancing, Wang et al.
    2024; DeepSeek-V3, section 2.1.2, took 0.001)."""
    expert_capacity_factor: float = 0.0
    """Above 0, in training only: an expert takes at most this multiple of the mean load of a micro-batch, rounded up,
    and what comes to it later is dropped (Switch Transformer, section 2.2). It shows what dropping does to a model and
    saves no time: what is dropped is computed, and weighs 0."""
    uniform_routing: bool = False
    """For benchmarks: every expert gets its exact share, since token n of a batch goes to experts (n K + j) mod E, j
    from 0 to K - 1, whatever the router says, which only weighs them. Such a model is not served."""

    block: Literal["llama", "gpt2"] = "llama"
    """`llama`: RMSNorm, SwiGLU, rotary positions, no biases. `gpt2`: LayerNorm, GELU without a gate, a learned table of
    `max_position_embeddings` positions, biases everywhere (Radford et al. 2019): counted and planned, not built."""
    mla: LatentAttention | None = None
    """Multi-head latent attention in place of ordinary heads; none by default."""
    mamba: Mamba | None = None
    """Mamba in place of attention in most layers; none by default."""
    vision: VisionEncoder | None = None
    """An encoder of images and cross-attention to it; none by default."""

    def __post_init__(self):
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        require_positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta")
        require_positive(self, "rms_norm_eps", "initializer_range")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
            f"{self.num_key_value_heads}; choose a divisor of {self.num_attention_heads}.",
        )
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
            f"{self.num_attention_heads}; change one of them or give head_dim.",
        )
        head_dim = self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads
        require(
            head_dim > 0 and head_dim % 2 == 0,
            f"head_dim = {head_dim} must be even and above 0: rotary embedding turns pairs of channels.",
        )
        object.__setattr__(self, "head_dim", head_dim)
        require(self.num_local_experts >= 0, f"num_local_experts = {self.num_local_experts} must be 0 (dense) or more.")
        require(self.n_shared_experts >= 0, f"n_shared_experts = {self.n_shared_experts} must be 0 or more.")
        if self.moe_intermediate_size is not None:
            require_positive(self, "moe_intermediate_size")
        if self.is_moe:
            require(
                1 <= self.num_experts_per_tok <= self.num_local_experts,
                f"num_experts_per_tok = {self.num_experts_per_tok} must be between 1 and num_local_experts = "
                f"{self.num_local_experts}.",
            )
        else:
            require(
                self.n_shared_experts == 0,
                f"n_shared_experts = {self.n_shared_experts} needs routed experts beside them: set num_local_experts.",
            )
            router = ("norm_topk_prob", "seq_aux", "router_bias_update_rate", "expert_capacity_factor",
                      "uniform_routing")  # fmt: skip
            idle = [
                f"{name} = {value}" for name in router if (value := getattr(self, name)) != getattr(type(self), name)
            ]
            require(
                not idle,
                f"{' and '.join(idle)} says how a router works, and num_local_experts = 0 has none: set "
                "num_local_experts, or leave it out.",
            )
            mixed = (self.first_k_dense_replace, self.expert_layer_period, self.expert_layer_offset)
            require(
                mixed == (0, 1, 0),
                "first_k_dense_replace, expert_layer_period and expert_layer_offset say which layers route, and "
                "num_local_experts = 0 lets none: set num_local_experts, or leave them out.",
            )
        require_positive(self, "expert_layer_period")
        require(
            0 <= self.expert_layer_offset < self.expert_layer_period,
            f"expert_layer_offset = {self.expert_layer_offset} must be from 0 to below expert_layer_period = "
            f"{self.expert_layer_period}.",
        )
        require(
            0 <= self.first_k_dense_replace < self.num_hidden_layers,
            f"first_k_dense_replace = {self.first_k_dense_replace} must be from 0 to below num_hidden_layers = "
            f"{self.num_hidden_layers}.",
        )
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} must be 0 or more.")
        require(
            0 <= self.router_jitter_noise < 1,
            f"router_jitter_noise = {self.router_jitter_noise} must be at least 0 and below 1.",
        )
        rate = self.router_bias_update_rate
        require(
            0 <= rate < 1,
            f"router_bias_update_rate = {rate} must be 0 (no bias) or more and below 1: it moves what is added to "
            "probabilities; 0.001 is usual.",
        )
        require(
            not (rate and self.uniform_routing),
            f"router_bias_update_rate = {rate} moves a bias by which experts are chosen, and uniform_routing = True "
            "chooses them by a token's place alone: leave one of them out.",
        )
        capacity = self.expert_capacity_factor
        require(
            0 <= capacity < math.inf,
            f"expert_capacity_factor = {capacity} must be 0 (no limit) or a finite number above it; 1.25 is usual.",
        )

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    def routes(self, layer: int) -> bool:
        """Whether the MLP of `layer` is a mixture."""
        placed = layer % self.expert_layer_period == self.expert_layer_offset
        return self.is_moe and placed and layer >= self.first_k_dense_replace

    @property
    def routing_layers(self) -> tuple[int, ...]:
        """The layers whose MLP is a mixture."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.routes(layer))

    def attends(self, layer: int) -> bool:
        """Whether `layer` has self-attention; the others have Mamba."""
        return self.mamba is None or layer % self.mamba.attn_layer_period == self.mamba.attn_layer_offset

    @property
    def only_planned(self) -> tuple[str, ...]:
        """The settings that name what `moe_lm.model` does not build; `moe_lm.scaling` counts and plans them."""
        kinds = {"block": self.block != "llama", "mla": self.mla, "mamba": self.mamba, "vision": self.vision}
        return tuple(name for name, there in kinds.items() if there)

    @property
    def expert_size(self) -> int:
        """Hidden width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size
