"""Parameters, FLOPs and cache of a model from its config, in closed form.

D hidden width, F MLP width, E experts, K experts per token, S shared experts, H query heads, G key-value heads,
C channels of a head, L layers, V vocabulary, P positions, T tokens of context, W width of the vision encoder,
I inner width of Mamba.
"""

from dataclasses import dataclass, fields

from moe_lm.config import ModelConfig


@dataclass(frozen=True)
class LayerParameters:
    """Number of weights of one block, biases with the matrix they belong to."""

    attention: int
    """(H + 2 G) C D for queries, keys and values, and H C D for the output; latent attention as it is built; or 0."""
    mamba: int
    """Projections, convolution and states of a selective state space; or 0."""
    cross_attention: int
    """The block of cross-attention and MLP that stands before this one; or 0."""
    router: int
    """E D; 0 where the MLP is dense."""
    experts: int
    """3 D F of each routed expert."""
    shared_experts: int
    """3 D F of each shared expert."""
    dense_mlp: int
    """3 D F, or 2 D F without a gate; 0 where the layer routes."""
    norms: int
    """2 D, and more in some kinds of block."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Parameters(LayerParameters):
    """Number of weights by component: those of all blocks together, the last norm among the norms, and what is beside.

    The vision encoder counts by itself.
    """

    embedding: int
    """The token table, V D, and with learned positions P D."""
    vision_encoder: int
    output: int
    """The projection to the vocabulary, V D; 0 when it is the token table."""
    active_experts: int
    """Those of the routed experts that one token passes through; part of `experts`."""

    @property
    def mlp(self) -> int:
        """All experts, routed and shared, and the dense MLPs."""
        return self.experts + self.shared_experts + self.dense_mlp

    @property
    def active_mlp(self) -> int:
        """Those that one token passes through."""
        return self.active_experts + self.shared_experts + self.dense_mlp

    @property
    def total(self) -> int:
        return super().total - self.active_experts

    @property
    def active(self) -> int:
        """Weights that one token uses; of the token table it reads one row, but by custom the table counts whole."""
        return self.total - self.experts + self.active_experts


def parameters(config: ModelConfig) -> Parameters:
    """Weights of the model, equal to those of the built one where `moe_lm.model` builds it."""
    D, V = config.hidden_size, config.vocab_size
    layers = [layer_parameters(config, layer) for layer in range(config.num_hidden_layers)]
    summed = {field.name: sum(getattr(layer, field.name) for layer in layers) for field in fields(LayerParameters)}
    summed["norms"] += norm_size(config)
    return Parameters(
        embedding=V * D + (config.max_position_embeddings * D if config.block == "gpt2" else 0),
        output=0 if config.tie_word_embeddings else V * D,
        vision_encoder=vision_parameters(config),
        active_experts=summed["experts"] // max(1, config.num_local_experts) * config.num_experts_per_tok,
        **summed,
    )


def layer_parameters(config: ModelConfig, layer: int) -> LayerParameters:
    """Weights of block `layer`, from 0."""
    D, routes, attends = config.hidden_size, config.routes(layer), config.attends(layer)
    expert = 3 * D * config.expert_size
    return LayerParameters(
        attention=attention_parameters(config) if attends else 0,
        mamba=0 if attends else mamba_parameters(config),
        cross_attention=cross_attention_parameters(config) if crosses(config, layer) else 0,
        router=config.num_local_experts * D if routes else 0,
        experts=config.num_local_experts * expert if routes else 0,
        shared_experts=config.n_shared_experts * expert if routes else 0,
        dense_mlp=0 if routes else mlp_parameters(config),
        norms=2 * norm_size(config),
    )


def norm_size(config: ModelConfig) -> int:
    """Weights of one norm over D: a scale, and in LayerNorm a shift."""
    return config.hidden_size * (2 if config.block == "gpt2" else 1)


def attention_parameters(config: ModelConfig) -> int:
    D, H, G, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.mla is None:
        return (2 * H + 2 * G) * C * D + attention_vectors(config)
    mla = config.mla
    queried, rank = H * (mla.qk_nope_head_dim + mla.qk_rope_head_dim), mla.q_lora_rank
    queries = (D + queried) * rank if rank else D * queried
    compressed = D * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expanded = mla.kv_lora_rank * H * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + compressed + expanded + H * mla.v_head_dim * D + attention_vectors(config)


def attention_vectors(config: ModelConfig) -> int:
    """Those of attention's weights that are no matrix: biases, or the norms of what latent attention compresses."""
    D, H, G, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.mla is not None:
        return config.mla.q_lora_rank + config.mla.kv_lora_rank
    return (H + 2 * G) * C + D if config.block == "gpt2" else 0


def mlp_parameters(config: ModelConfig) -> int:
    D, F = config.hidden_size, config.intermediate_size
    return (2 if config.block == "gpt2" else 3) * D * F + mlp_vectors(config)


def mlp_vectors(config: ModelConfig) -> int:
    """The biases of a dense MLP."""
    return config.intermediate_size + config.hidden_size if config.block == "gpt2" else 0


def mamba_parameters(config: ModelConfig) -> int:
    """As in transformers' JambaMambaMixer, with the three norms that Jamba adds (Lieber et al. 2024, section 6)."""
    mamba, D = config.mamba, config.hidden_size
    inner, rank, states = mamba.expand * D, mamba.dt_rank, mamba.d_state
    projections = D * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * D
    return projections + inner * mamba.d_conv + mamba_vectors(config)


def mamba_vectors(config: ModelConfig) -> int:
    """Decays of the states, what passes by them, two biases and three norms."""
    mamba = config.mamba
    inner, states = mamba.expand * config.hidden_size, mamba.d_state
    return inner * states + inner + 2 * inner + mamba.dt_rank + 2 * states


def crosses(config: ModelConfig, layer: int) -> bool:
    """Whether a block of cross-attention stands before `layer`."""
    return config.vision is not None and layer % config.vision.cross_attention_period == 0


def cross_attention_parameters(config: ModelConfig) -> int:
    """Queries and output of D, keys and values of W; an MLP without a gate; a norm before and a gate after each."""
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * config.vision.hidden_size
    return cross_attention_matrices(config) + keys_and_values + 2 * norm_size(config) + 2


def cross_attention_matrices(config: ModelConfig) -> int:
    """Those weights of it that multiply the text."""
    D, width = config.hidden_size, config.vision.cross_attention_intermediate_size or 4 * config.hidden_size
    return 2 * config.num_attention_heads * config.head_dim * D + 2 * D * width


def vision_parameters(config: ModelConfig) -> int:
    """A ViT (Dosovitskiy et al. 2021) without a class token: patches, positions, blocks with biases, a last norm."""
    vision = config.vision
    if vision is None:
        return 0
    W, F, patches = vision.hidden_size, vision.intermediate_size, vision.image_tokens
    block = 4 * W * W + 4 * W + 2 * W * F + F + W + 4 * W
    return 3 * vision.patch_size**2 * W + W + patches * W + vision.num_hidden_layers * block + 2 * W


def cache_numbers(config: ModelConfig) -> int:
    """Numbers that the cache holds per token: 2 G C in each layer with attention, or what latent attention keeps."""
    layers = sum(config.attends(layer) for layer in range(config.num_hidden_layers))
    if config.mla is not None:
        return layers * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim)
    return layers * 2 * config.num_key_value_heads * config.head_dim


def forward_flops_per_token(config: ModelConfig, context: float) -> float:
    """Multiplications and additions of one token's forward pass that attends to `context` tokens on average.

    Two per weight of a matrix that multiplies it, tables not being multiplied, and for scores and weighted values 4 H C
    per token of context and layer with attention. A selective state space takes 9 I per state (Gu and Dao 2023,
    appendix D). Of vision it counts what the text costs beside one image, not the encoder.
    """
    layers = range(config.num_hidden_layers)
    flops = 2.0 * config.vocab_size * config.hidden_size
    for layer in layers:
        counts = layer_parameters(config, layer)
        active = counts.experts // max(1, config.num_local_experts) * config.num_experts_per_tok
        flops += 2 * (counts.router + active + counts.shared_experts)
        if not config.routes(layer):
            flops += 2 * (counts.dense_mlp - mlp_vectors(config))
        if config.attends(layer):
            flops += 2 * (counts.attention - attention_vectors(config) + attention_channels(config) * context)
        else:
            flops += 2 * (counts.mamba - mamba_vectors(config))
            flops += 9 * config.mamba.expand * config.hidden_size * config.mamba.d_state
        if crosses(config, layer):
            patches = config.vision.image_tokens
            flops += 2 * (cross_attention_matrices(config) + attention_channels(config) * patches)
    return flops


def attention_channels(config: ModelConfig) -> int:
    """Channels that a query meets in a key, over all heads, and those that it gathers from a value: 2 H C."""
    H, mla = config.num_attention_heads, config.mla
    if mla is not None:
        return H * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    return 2 * H * config.head_dim


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward (twice the forward) of one token in causal rows of `sequence_length`, no recomputation."""
    return 3 * forward_flops_per_token(config, (sequence_length + 1) / 2)
