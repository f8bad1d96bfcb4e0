"""`ModelConfig` and the config.json of the Hugging Face families of `moe_lm.checkpoint.hf_family`, both ways."""

import math
from typing import Any

import torch

from moe_lm.checkpoint.hf_family import (
    ERNIE,
    GRANITE,
    MISTRAL,
    MIXTRAL,
    NO_BIAS,
    QWEN2,
    Family,
    check_exportable,
    export_family,
    family_of,
)
from moe_lm.checkpoint.hf_layers import (
    PLACING,
    ernie_layers,
    qwen2_layers,
    read_layers,
    whole,
    write_ernie_layers,
    write_qwen2_layers,
)
from moe_lm.config import ModelConfig, require
from moe_lm.toml import from_value

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
          "rope_theta", "tie_word_embeddings")  # fmt: skip
ROUTER = ("num_local_experts", "num_experts_per_tok")
ROUTER_TRAINING = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "seq_aux",
                   "expert_capacity_factor")  # fmt: skip
BIAS_UPDATE_RATE = 1e-3
"""Of an Ernie4_5_Moe file that says nothing of it, whose bias is then kept in balance by more training as DeepSeek-V3's
was (section 4.2)."""
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
        settings.update({family.key(name): getattr(config, name) for name in ROUTER})
        settings.update({name: getattr(config, name) for name in ROUTER_TRAINING})
        settings["output_router_logits"] = False
        # The grouped GEMM that transformers 5 takes by default refuses rows that are no multiple of 16 bytes.
        if config.hidden_size % 8 or config.expert_size % 8:
            settings["experts_implementation"] = "eager"
    if family.shared is not None:
        settings[family.shared] = config.n_shared_experts * config.expert_size
    if config.is_moe and len(config.routing_layers) == config.num_hidden_layers:
        settings["intermediate_size"] = config.expert_size
    if family in (ERNIE, QWEN2):
        settings["moe_intermediate_size"] = config.expert_size
        settings.update({name: getattr(config, name) for name in PLACING})
    if family is GRANITE:
        settings["attention_multiplier"] = config.head_dim**-0.5
    if family is ERNIE:
        # Its pad_token_id is 0 where none is given, and that token's embedding would get no gradient in fine-tuning.
        settings.update({"pad_token_id": None, "moe_num_shared_experts": config.n_shared_experts})
        settings["router_bias_update_rate"] = config.router_bias_update_rate
        settings.update(write_ernie_layers(config))
    if family is QWEN2:
        settings["norm_topk_prob"] = config.norm_topk_prob
        settings.update(write_qwen2_layers(config))
    return settings


def from_hf_config(settings: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json of transformers 4 or 5 describes, of any family in FAMILIES.

    It is the config that `to_hf_config` was given, but that the experts' width is in `intermediate_size` where no layer
    is dense or all are as wide, and that what has no effect (the router's settings of a dense model, llama3's of a
    linear scaling) is at its default. Raises ConfigError for an architecture, or a variation of one, that `Transformer`
    does not compute.
    """
    family = family_of(settings)
    settings = settings | {key: value for key, value in family.assumed.items() if settings.get(key) is None}
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
        values.update({name: settings[family.key(name)] for name in ROUTER})
        values.update(given(settings, ROUTER_TRAINING))
    if family in (ERNIE, QWEN2):
        values.update(mixed_layers(settings, family))
    if family.shared is not None:
        values["n_shared_experts"] = shared_experts(settings, family)
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


def check_plain(settings: dict[str, Any], family: Family) -> None:
    """Refuse the variations of a family that change what it computes."""
    for key in ("quantization_config", "compression_config"):
        require(
            not settings.get(key),
            f"{key} is set, and moe-lm opens no quantized weights: name the model in float32, float16 or bfloat16.",
        )
    normalised = {} if family is QWEN2 else {"norm_topk_prob": True}
    for key, value in {**NO_BIAS, "mlp_bias": False, **normalised, **family.fixed}.items():
        found = settings.get(key, value)
        require(found == value, f"{key} = {found!r} must be {value!r}: moe-lm's model computes nothing else.")
    types = settings.get("layer_types")
    require(
        types is None or (isinstance(types, list) and all(kind == "full_attention" for kind in types)),
        f"layer_types = {types!r} must be full_attention in every layer.",
    )


def check_window(settings: dict[str, Any], family: Family, limit: int) -> None:
    if family is QWEN2:  # has a switch beside the width, which check_plain has seen off
        return
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


def mixed_layers(settings: dict[str, Any], family: Family) -> dict[str, Any]:
    """What Ernie4_5_Moe and Qwen2Moe say in keys of their own, as ModelConfig has it."""
    whole(settings, family.key("num_local_experts"), 1)
    width = whole(settings, "moe_intermediate_size", 1)
    layers = ernie_layers(settings) if family is ERNIE else qwen2_layers(settings)
    values: dict[str, Any] = read_layers(settings, layers)
    if len(layers) == settings["num_hidden_layers"]:
        values["intermediate_size"] = width
    elif width != settings["intermediate_size"]:
        values["moe_intermediate_size"] = width
    if family is QWEN2:
        return {**values, "norm_topk_prob": settings["norm_topk_prob"]}
    smallest = settings.get("moe_norm_min", 1e-12)
    require(
        type(smallest) in (int, float) and smallest <= 1e-9,
        f"moe_norm_min = {smallest!r} must be at most 1e-9: moe-lm's weights of the chosen experts sum to 1.",
    )
    values["n_shared_experts"] = settings["moe_num_shared_experts"]
    values["router_bias_update_rate"] = settings.get("router_bias_update_rate", BIAS_UPDATE_RATE)
    return values


def shared_experts(settings: dict[str, Any], family: Family) -> int:
    name = "intermediate_size" if family is GRANITE else "moe_intermediate_size"
    shared, width = settings.get(family.shared, 0), settings[name]
    require(
        type(shared) is int and type(width) is int and width > 0 and shared >= 0 and shared % width == 0,
        f"{family.shared} = {shared!r} must be a multiple of {name} = {width!r}: moe-lm's shared experts are as wide "
        "as the routed ones.",
    )
    return shared // width
