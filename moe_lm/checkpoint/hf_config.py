"""`ModelConfig` and the config.json of the four Hugging Face families that share its architecture.

Mixtral is the mixture, Llama and Mistral are dense, GraniteMoeShared is the mixture with shared experts.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_lm.config import ConfigError, ModelConfig, require
from moe_lm.toml import from_value


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
    is_moe: bool = False


SILU, NO_BIAS = {"hidden_act": "silu"}, {"attention_bias": False}
MULTIPLIERS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
LLAMA = Family("LlamaForCausalLM", "llama", 2048, fixed={**SILU, **NO_BIAS, "mlp_bias": False})
MISTRAL = Family(
    "MistralForCausalLM", "mistral", 131072, num_key_value_heads=8, sliding_window=4096, fixed=SILU
)  # fmt: skip
MIXTRAL = Family(
    "MixtralForCausalLM", "mixtral", 131072, 1e-5, 1e6, num_key_value_heads=8, fixed=SILU, is_moe=True
)  # fmt: skip
GRANITE = Family(
    "GraniteMoeSharedForCausalLM", "granitemoeshared", 2048, fixed={**SILU, **NO_BIAS, **MULTIPLIERS}, is_moe=True
)  # fmt: skip
FAMILIES = (MIXTRAL, MISTRAL, LLAMA, GRANITE)

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
          "rope_theta", "tie_word_embeddings")  # fmt: skip
ROUTER = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef",
          "router_jitter_noise")  # fmt: skip
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def export_family(config: ModelConfig) -> Family:
    """The family that an export of `config` belongs to."""
    if config.n_shared_experts:
        return GRANITE
    if config.is_moe:
        return MIXTRAL
    # transformers 5 refuses a LlamaConfig whose heads do not divide hidden_size; Mistral without a window is the same
    # architecture and has no such rule.
    return MISTRAL if config.hidden_size % config.num_attention_heads else LLAMA


def check_exportable(config: ModelConfig) -> None:
    """Raise ConfigError where no family holds `config`: to be asked before hours are spent on training it."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    mixed = [
        f"model.{name} = {value}"
        for name in ("first_k_dense_replace", "expert_layer_period")
        if (value := getattr(config, name)) != getattr(ModelConfig, name)
    ]
    require(
        not mixed,
        f"{' and '.join(mixed)} makes some layers dense beside those that route: such a model is built, counted and "
        "planned, but no Hugging Face family that a checkpoint is saved as holds it: leave it out to train.",
    )
    require(
        config.n_shared_experts == 0 or heads * head_dim == config.hidden_size,
        f"model.head_dim = {head_dim} must be hidden_size / num_attention_heads = {config.hidden_size} / {heads} where "
        f"model.n_shared_experts = {config.n_shared_experts} is above 0: {GRANITE.architecture}, the format such a "
        "model is saved in, has no other.",
    )
    require(
        export_family(config) is not LLAMA or config.initializer_range <= 1,
        f"model.initializer_range = {config.initializer_range} must be at most 1 in a dense model: transformers opens "
        f"no {LLAMA.architecture} above it.",
    )


def to_hf_config(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """The config.json of a model of this shape with weights of `dtype`, as transformers 4 and 5 read it.

    Beside its family's keys it has those of the router's training that only `from_hf_config` knows; transformers
    keeps unknown keys and minds none. Raises ConfigError where `check_exportable` does.
    """
    check_exportable(config)
    family = export_family(config)
    settings = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(config, name) for name in SHAPE + COMMON},
        **family.fixed,
        # The spelling of transformers 4, which 5 reads as well, and every other reader with it.
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        keys = ROPE_KEYS[scaling.rope_type]
        settings["rope_scaling"] = {"rope_type": scaling.rope_type, **{key: getattr(scaling, key) for key in keys}}
    if family in (MISTRAL, MIXTRAL):
        settings["sliding_window"] = None
    if family.is_moe:
        settings.update({name: getattr(config, name) for name in ROUTER})
        settings["intermediate_size"] = config.expert_size
        settings["output_router_logits"] = False
        # The grouped GEMM that transformers 5 takes by default refuses rows that are no multiple of 16 bytes.
        if config.hidden_size % 8 or config.expert_size % 8:
            settings["experts_implementation"] = "eager"
    if family is GRANITE:
        settings["shared_intermediate_size"] = config.n_shared_experts * config.expert_size
        settings["attention_multiplier"] = config.head_dim**-0.5
    return settings


def from_hf_config(settings: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json of transformers 4 or 5 describes, of any family in FAMILIES.

    It is the config that `to_hf_config` was given, but that the experts' width is always in `intermediate_size`, and
    that what has no effect (the router's settings of a dense model, llama3's of a linear scaling) is at its default.
    Raises ConfigError for an architecture, or a variation of one, that `Transformer` does not compute.
    """
    family = family_of(settings)
    check_plain(settings, family)
    missing = [name for name in SHAPE if settings.get(name) is None]
    require(not missing, f"{', '.join(missing)} is not given, and a model has no shape without it.")
    defaults = {name: getattr(family, name) for name in ("max_position_embeddings", "rms_norm_eps", "rope_theta")}
    defaults["num_key_value_heads"] = family.num_key_value_heads or settings["num_attention_heads"]
    values = {**defaults, **given(settings, SHAPE + COMMON), "num_local_experts": 0}
    if settings.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = settings["num_attention_heads"]
    values.update(read_rope(settings, values["rope_theta"], values["max_position_embeddings"]))
    if family.is_moe:
        values.update({"num_local_experts": 8, "num_experts_per_tok": 2, **given(settings, ROUTER)})
    if family is GRANITE:
        values["n_shared_experts"] = shared_experts(settings)
    config = from_value(ModelConfig, values, "")
    check_window(settings, family, config.max_position_embeddings)
    if family is GRANITE:
        multiplier, expected = settings.get("attention_multiplier", 1.0), config.head_dim**-0.5
        require(
            type(multiplier) in (int, float) and math.isclose(multiplier, expected, rel_tol=1e-6),
            f"attention_multiplier = {multiplier!r} must be 1 / sqrt(head_dim) = {expected}.",
        )
    return config


def given(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def family_of(settings: dict[str, Any]) -> Family:
    names = settings.get("architectures")
    if not isinstance(names, list) or not names:
        kind = settings.get("model_type")
        names = [next((family.architecture for family in FAMILIES if family.model_type == kind), kind)]
    family = next((family for family in FAMILIES if family.architecture == names[0]), None)
    known = ", ".join(family.architecture for family in FAMILIES)
    if family is None:
        raise ConfigError(f"architecture {names[0]!r} is not one that moe-lm opens: {known}.")
    return family


def check_plain(settings: dict[str, Any], family: Family) -> None:
    """Refuse the variations of a family that change what it computes."""
    for key in ("quantization_config", "compression_config"):
        require(
            not settings.get(key),
            f"{key} is set, and moe-lm opens no quantized weights: name the model in float32, float16 or bfloat16.",
        )
    for key, value in {**NO_BIAS, "mlp_bias": False, **family.fixed}.items():
        found = settings.get(key, value)
        require(found == value, f"{key} = {found!r} must be {value!r}: moe-lm's model computes nothing else.")
    types = settings.get("layer_types")
    require(
        types is None or (isinstance(types, list) and all(kind == "full_attention" for kind in types)),
        f"layer_types = {types!r} must be full_attention in every layer.",
    )


def check_window(settings: dict[str, Any], family: Family, limit: int) -> None:
    window = settings.get("sliding_window", family.sliding_window)
    require(
        window is None or (type(window) is int and window >= limit),
        f"sliding_window = {window!r} must be null or at least max_position_embeddings = {limit}: moe-lm attends to "
        "the whole context.",
    )


def read_rope(settings: dict[str, Any], theta: Any, max_position_embeddings: Any) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as ModelConfig has them, with transformers' order of precedence."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    require(
        isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()),
        f"rope parameters {rope!r} must be one flat table: moe-lm rotates alike in every layer.",
    )
    part = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    require(part in (None, 1), f"partial_rotary_factor = {part!r} must be 1: moe-lm rotates whole heads.")
    values = {"rope_theta": rope.get("rope_theta", theta), "rope_scaling": None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return values
    require(
        kind in tuple(ROPE_KEYS),
        f"rope type {kind!r} is not one that moe-lm computes: default, {', '.join(ROPE_KEYS)}.",
    )
    scaling = {"rope_type": kind, **given(rope, ROPE_KEYS[kind])}
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
    missing = [key for key in ROPE_KEYS[kind] if key not in scaling]
    require(not missing, f"rope type {kind!r} lacks {', '.join(missing)}.")
    return {**values, "rope_scaling": scaling}


def shared_experts(settings: dict[str, Any]) -> int:
    shared, width = settings.get("shared_intermediate_size", 0), settings["intermediate_size"]
    require(
        type(shared) is int and type(width) is int and width > 0 and shared >= 0 and shared % width == 0,
        f"shared_intermediate_size = {shared!r} must be a multiple of intermediate_size = {width!r}: moe-lm's shared "
        "experts are as wide as the routed ones.",
    )
    return shared // width
