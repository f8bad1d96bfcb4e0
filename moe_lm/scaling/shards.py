"""Which part of every weight a rank holds: Megatron's tensor parallelism, pipeline stages, experts over replicas.

Matrices are (out, in), as torch keeps them. One that follows a norm is cut by its outputs, each rank with whole heads
or hidden channels, and the one that writes to the residual stream by its inputs, so that a block of attention or MLP
needs one sum over ranks (Shoeybi et al. 2019, section 3). The token table and the output are cut by rows of the
vocabulary. Experts are dealt over the `ep` replicas that share them, then each is cut as any MLP. Norms, the router,
biases of what is summed, and compressions of latent attention are whole on every rank, and so is a key-value head that
there are more ranks than heads for.

D hidden width, H query heads, G key-value heads, C channels of a head, F MLP width, E experts, S shared experts,
V vocabulary, P positions, I inner width of Mamba.
"""

import math
from collections.abc import Mapping

from moe_lm.config import ModelConfig
from moe_lm.scaling.counts import crosses, vision_parameters
from moe_lm.scaling.layout import Stage

Shape = tuple[int, ...]

VOCABULARY_TILE = 128
"""Rows of the vocabulary per rank come in multiples of it where they must be padded, as Megatron-LM's
--make-vocab-size-divisible-by."""


def held(model: ModelConfig, tp: int, stage: Stage, ep: int) -> dict[str, Shape]:
    """Shapes of what each rank of `stage` holds, named as in the state dict of moe_lm.model.Transformer.

    The same for every tensor- and expert-parallel rank. Sizes that do not divide are refused by
    moe_lm.scaling.layout.settle; a vocabulary that `tp` does not divide is padded (`vocabulary_rows`).
    """
    shapes = end_shapes(model, tp, stage)
    for layer in stage.layers:
        parts = layer_shapes(model, layer, tp) | expert_shapes(model, layer, tp, ep)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def numbers(shapes: Mapping[str, Shape]) -> int:
    """Weights in `shapes`; times the width of one, their bytes."""
    return sum(map(math.prod, shapes.values()))


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary on each of `tp` ranks; padded to a multiple of 128 a rank where `tp` does not divide."""
    if vocab_size % tp == 0:
        return vocab_size // tp
    return math.ceil(vocab_size / (VOCABULARY_TILE * tp)) * VOCABULARY_TILE


def kv_heads(model: ModelConfig, tp: int) -> int:
    """Key-value heads on a rank: G / tp, or one that other ranks hold, too."""
    return max(1, model.num_key_value_heads // tp)


def end_shapes(model: ModelConfig, tp: int, stage: Stage) -> dict[str, Shape]:
    """What the first and the last stage hold beside layers. An output that is the token table is copied to the last."""
    D = model.hidden_size
    rows = vocabulary_rows(model.vocab_size, tp)
    shapes: dict[str, Shape] = {}
    if stage.embedding:
        shapes["embed_tokens"] = (rows, D)
        if model.block == "gpt2":
            shapes["embed_positions"] = (model.max_position_embeddings, D)
        if model.vision is not None:  # small beside the decoder, and whole on each rank of the first stage
            shapes["vision_encoder"] = (vision_parameters(model),)
    if stage.output:
        shapes |= norm_shapes(model, "norm")
        shapes["embed_tokens" if model.tie_word_embeddings else "lm_head.weight"] = (rows, D)
    return shapes


def layer_shapes(model: ModelConfig, layer: int, tp: int) -> dict[str, Shape]:
    """What a rank holds of block `layer`, its routed experts apart; names without `layers.N.`."""
    D = model.hidden_size
    shapes = norm_shapes(model, "input_layernorm") | norm_shapes(model, "post_attention_layernorm")
    if not model.attends(layer):
        shapes |= mamba_shapes(model, tp)
    elif model.mla is not None:
        shapes |= latent_shapes(model, tp)
    else:
        shapes |= attention_shapes(model, tp)
    if model.routes(layer):
        shapes["mlp.gate.weight"] = (model.num_local_experts, D)
        if model.n_shared_experts:
            width = model.n_shared_experts * model.expert_size // tp
            shapes["mlp.shared_experts.gate_up_proj.weight"] = (2 * width, D)
            shapes["mlp.shared_experts.down_proj.weight"] = (D, width)
    else:
        shapes |= mlp_shapes(model, tp)
    if crosses(model, layer):
        shapes |= cross_shapes(model, tp)
    return shapes


def expert_shapes(model: ModelConfig, layer: int, tp: int, ep: int) -> dict[str, Shape]:
    """What a rank holds of the routed experts of block `layer`."""
    if not model.routes(layer):
        return {}
    D, E, F = model.hidden_size, model.num_local_experts // ep, model.expert_size // tp
    return {"mlp.experts.gate_up_proj": (E, 2 * F, D), "mlp.experts.down_proj": (E, D, F)}


def norm_shapes(model: ModelConfig, name: str) -> dict[str, Shape]:
    shapes = {f"{name}.weight": (model.hidden_size,)}
    return shapes | {f"{name}.bias": (model.hidden_size,)} if model.block == "gpt2" else shapes


def attention_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    D, H, C = model.hidden_size, model.num_attention_heads, model.head_dim
    rows = (H // tp + 2 * kv_heads(model, tp)) * C
    shapes = {"self_attn.qkv_proj.weight": (rows, D), "self_attn.o_proj.weight": (D, H // tp * C)}
    if model.block == "gpt2":
        shapes |= {"self_attn.qkv_proj.bias": (rows,), "self_attn.o_proj.bias": (D,)}
    return shapes


def latent_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    D, H, mla = model.hidden_size, model.num_attention_heads // tp, model.mla
    queried, rank = H * (mla.qk_nope_head_dim + mla.qk_rope_head_dim), mla.kv_lora_rank
    shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (rank + mla.qk_rope_head_dim, D),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (H * (mla.qk_nope_head_dim + mla.v_head_dim), rank),
        "self_attn.o_proj.weight": (D, H * mla.v_head_dim),
    }
    if not mla.q_lora_rank:
        return shapes | {"self_attn.q_proj.weight": (queried, D)}
    return shapes | {
        "self_attn.q_a_proj.weight": (mla.q_lora_rank, D),
        "self_attn.q_a_layernorm.weight": (mla.q_lora_rank,),
        "self_attn.q_b_proj.weight": (queried, mla.q_lora_rank),
    }


def mamba_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    """A rank has I / tp channels; step sizes and states are summed over ranks before their norms."""
    mamba, D = model.mamba, model.hidden_size
    inner, rank, states = mamba.expand * D // tp, mamba.dt_rank, mamba.d_state
    return {
        "mamba.in_proj.weight": (2 * inner, D),
        "mamba.conv1d.weight": (inner, mamba.d_conv),
        "mamba.conv1d.bias": (inner,),
        "mamba.x_proj.weight": (rank + 2 * states, inner),
        "mamba.dt_proj.weight": (inner, rank),
        "mamba.dt_proj.bias": (inner,),
        "mamba.A_log": (inner, states),
        "mamba.D": (inner,),
        "mamba.out_proj.weight": (D, inner),
        "mamba.dt_layernorm.weight": (rank,),
        "mamba.b_layernorm.weight": (states,),
        "mamba.c_layernorm.weight": (states,),
    }


def mlp_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    D, F = model.hidden_size, model.intermediate_size // tp
    if model.block == "gpt2":
        return {
            "mlp.up_proj.weight": (F, D),
            "mlp.up_proj.bias": (F,),
            "mlp.down_proj.weight": (D, F),
            "mlp.down_proj.bias": (D,),
        }
    return {"mlp.gate_up_proj.weight": (2 * F, D), "mlp.down_proj.weight": (D, F)}


def cross_shapes(model: ModelConfig, tp: int) -> dict[str, Shape]:
    """The block of cross-attention before a layer; its keys and values come from the encoder's width."""
    D, H, C, vision = model.hidden_size, model.num_attention_heads // tp, model.head_dim, model.vision
    width = (vision.cross_attention_intermediate_size or 4 * D) // tp
    return (
        norm_shapes(model, "cross_attn.input_layernorm")
        | norm_shapes(model, "cross_attn.post_attention_layernorm")
        | {
            "cross_attn.q_proj.weight": (H * C, D),
            "cross_attn.kv_proj.weight": (2 * kv_heads(model, tp) * C, vision.hidden_size),
            "cross_attn.o_proj.weight": (D, H * C),
            "cross_attn.up_proj.weight": (width, D),
            "cross_attn.down_proj.weight": (D, width),
            "cross_attn.attention_gate": (1,),
            "cross_attn.mlp_gate": (1,),
        }
    )
