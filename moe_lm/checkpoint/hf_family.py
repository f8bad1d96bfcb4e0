"""The Hugging Face families that share `ModelConfig`'s architecture, and which one an export belongs to.

Llama and Mistral are dense. Mixtral is the plain mixture, GraniteMoeShared has shared experts. Ernie4_5_Moe puts dense
layers among those that route and corrects the choice of experts by a bias; Qwen2Moe leaves the weights of the chosen
experts as the softmax over all has them. All as transformers 5.23 computes them.
"""

from dataclasses import dataclass, field
from typing import Any

from moe_lm.checkpoint.hf_layers import interval_of
from moe_lm.config import ConfigError, ModelConfig, require


@dataclass(frozen=True)
class Family:
    """One architecture of the transformers library, and what it takes a key to be that config.json leaves out."""

    architecture: str
    model_type: str
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    num_key_value_heads: int | None = None
    sliding_window: int | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys that an export writes as they stand, and that a file may have in no other value."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """What other keys are taken to be that a file leaves out."""
    names: dict[str, str] = field(default_factory=dict)
    """The family's name of a field of ModelConfig, where it has one of its own."""
    shared: str | None = None
    """The key that holds the width of all shared experts together, where they are not counted."""
    is_moe: bool = False

    def key(self, name: str) -> str:
        """The key of config.json that holds the field `name` of ModelConfig."""
        return self.names.get(name, name)


SILU, NO_BIAS = {"hidden_act": "silu"}, {"attention_bias": False}
MULTIPLIERS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
LLAMA = Family("LlamaForCausalLM", "llama", 2048, fixed={**SILU, **NO_BIAS, "mlp_bias": False})
MISTRAL = Family(
    "MistralForCausalLM", "mistral", 131072, num_key_value_heads=8, sliding_window=4096, fixed=SILU
)  # fmt: skip
MIXTRAL = Family(
    "MixtralForCausalLM", "mixtral", 131072, 1e-5, 1e6, num_key_value_heads=8, fixed=SILU, is_moe=True,
    assumed={"num_local_experts": 8, "num_experts_per_tok": 2},
)  # fmt: skip
GRANITE = Family(
    "GraniteMoeSharedForCausalLM", "granitemoeshared", 2048, fixed={**SILU, **NO_BIAS, **MULTIPLIERS}, is_moe=True,
    shared="shared_intermediate_size",
    assumed={"num_local_experts": 8, "num_experts_per_tok": 2},
)  # fmt: skip
ERNIE = Family(
    "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", 131072, 1e-5, 5e5, num_key_value_heads=4,
    fixed={**SILU, "use_bias": False}, is_moe=True,
    names={"num_local_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    assumed={
        "tie_word_embeddings": True, "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
)  # fmt: skip
QWEN2 = Family(
    "Qwen2MoeForCausalLM", "qwen2_moe", 32768, num_key_value_heads=16,
    fixed={**SILU, "qkv_bias": False, "use_sliding_window": False}, is_moe=True,
    shared="shared_expert_intermediate_size", names={"num_local_experts": "num_experts"},
    assumed={
        "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)  # fmt: skip
FAMILIES = (MIXTRAL, MISTRAL, LLAMA, GRANITE, ERNIE, QWEN2)


def export_family(config: ModelConfig) -> Family:
    """The family that an export of `config` belongs to."""
    if config.is_moe:
        return mixture_family(config)
    # transformers 5 refuses a LlamaConfig whose heads do not divide hidden_size; Mistral without a window is the same
    # architecture and has no such rule.
    return MISTRAL if config.hidden_size % config.num_attention_heads else LLAMA


def mixture_family(config: ModelConfig) -> Family:
    if not config.norm_topk_prob:
        return QWEN2
    if config.router_bias_update_rate:
        return ERNIE
    if len(config.routing_layers) < config.num_hidden_layers:
        # Qwen2Moe names its dense layers one by one, so it holds any order of them. Ernie comes first because its
        # shared experts are ours, where Qwen2Moe's have a gate that training elsewhere would move.
        return QWEN2 if interval_of(config.routing_layers, config.num_hidden_layers) is None else ERNIE
    if config.n_shared_experts:
        whole = config.num_attention_heads * config.head_dim == config.hidden_size
        return GRANITE if whole else ERNIE  # GraniteMoeShared has no head_dim of its own
    return MIXTRAL


def check_exportable(config: ModelConfig) -> None:
    """Raise ConfigError where no family holds `config`: to be asked before hours are spent on training it."""
    require(
        not config.uniform_routing,
        "model.uniform_routing = true is for benchmarks, and no Hugging Face family that a checkpoint is saved as has "
        "it: leave it out to train.",
    )
    if config.is_moe and config.router_bias_update_rate:
        rate = f"model.router_bias_update_rate = {config.router_bias_update_rate}"
        require(
            config.norm_topk_prob,
            f"{rate} and model.norm_topk_prob = false: no Hugging Face family that a checkpoint is saved as has a bias "
            "on the choice of experts beside weights that are not normalised: leave either of them out to train.",
        )
        require(
            interval_of(config.routing_layers, config.num_hidden_layers) is not None,
            f"{rate} and routing layers {listed(config.routing_layers)} of {config.num_hidden_layers}: "
            f"{ERNIE.architecture}, the format a model with a bias on the choice of experts is saved in, counts every "
            "so many layers from -1: set model.expert_layer_offset = expert_layer_period - 1, or leave the bias out.",
        )
    require(
        export_family(config) is not LLAMA or config.initializer_range <= 1,
        f"model.initializer_range = {config.initializer_range} must be at most 1 in a dense model: transformers opens "
        f"no {LLAMA.architecture} above it.",
    )


def family_of(settings: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError for one that is none of FAMILIES."""
    names = settings.get("architectures")
    if not isinstance(names, list) or not names:
        kind = settings.get("model_type")
        names = [next((family.architecture for family in FAMILIES if family.model_type == kind), kind)]
    family = next((family for family in FAMILIES if family.architecture == names[0]), None)
    known = ", ".join(family.architecture for family in FAMILIES)
    if family is None:
        raise ConfigError(f"architecture {names[0]!r} is not one that moe-lm opens: {known}.")
    return family


def listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
