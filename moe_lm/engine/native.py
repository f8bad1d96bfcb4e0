"""The native step of a CPU (kernels.cpu.decoder) for a model: whether it can be had, and making it."""

import torch
from torch import Tensor

from kernels.cpu import decoder
from moe_lm.model import Transformer
from moe_lm.model.moe import MoE
from moe_lm.model.transformer import Block


def why_not(model: Transformer, kv_dtype: torch.dtype) -> str | None:
    """Why the model cannot be stepped natively, as the end of a sentence; None if it can. May compile the library."""
    weight = model.embed_tokens
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}"
    if model.compute_dtype not in (None, weight.dtype):
        return f"the weights are {weight.dtype} and computed in {model.compute_dtype}"
    if kv_dtype not in (weight.dtype, torch.float32):
        return f"the cache is {kv_dtype} and the weights are {weight.dtype}"
    reason = decoder.unavailable(weight.dtype)
    return reason and reason[0].lower() + reason[1:].rstrip(".")


def make_decoder(model: Transformer, generic: bool = False) -> decoder.Decoder:
    """A decoder that uses the model's weights in place; `generic` as in Decoder."""
    config = model.config
    return decoder.Decoder(
        [layer_weights(block) for block in model.layers], model.embed_tokens, model.norm.weight, model.output_weight,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        top_k=config.num_experts_per_tok, eps=config.rms_norm_eps, normalize=config.norm_topk_prob, generic=generic,
    )  # fmt: skip


def layer_weights(block: Block) -> dict[str, Tensor]:
    """One layer's weights by the names that Decoder knows."""
    weights = {
        "input_layernorm": block.input_layernorm.weight, "qkv_proj": block.self_attn.qkv_proj.weight,
        "o_proj": block.self_attn.o_proj.weight, "post_attention_layernorm": block.post_attention_layernorm.weight,
    }  # fmt: skip
    mlp = block.mlp
    if not isinstance(mlp, MoE):
        return weights | {"gate_up_proj": mlp.gate_up_proj.weight, "down_proj": mlp.down_proj.weight}
    weights |= {
        "gate": mlp.gate.weight, "gate_up_proj": mlp.experts.gate_up_proj, "down_proj": mlp.experts.down_proj,
    }  # fmt: skip
    if mlp.e_score_correction_bias is not None:
        weights["bias"] = mlp.e_score_correction_bias
    if mlp.shared_experts is not None:
        weights["shared_gate_up_proj"] = mlp.shared_experts.gate_up_proj.weight
        weights["shared_down_proj"] = mlp.shared_experts.down_proj.weight
    return weights
