"""The weights under the names that the hub gives them.

The hub keeps queries, keys and values apart, gate and up apart, and Mixtral's every expert apart; `Transformer` has
each of these groups as one parameter. One table, `hf_layout`, says which rows of which parameter a tensor on disk is,
and serves both ways.
"""

from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import Tensor

from moe_lm.checkpoint.hf_config import GRANITE, export_family
from moe_lm.config import ModelConfig


class Place(NamedTuple):
    """Where a tensor on disk lies in memory."""

    parameter: str
    """Its name in `Transformer.state_dict()`."""
    expert: int | None = None
    """Index along the first axis, removed by it; None takes all."""
    start: int = 0
    """First row."""
    stop: int | None = None
    """Row after the last."""

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """A view of this place's parameter."""
        tensor = state[self.parameter]
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]


def to_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Views of a `Transformer.state_dict()` under the names of the family that `config` is exported as.

    A tied output projection has no tensor of its own, neither here nor on disk.
    """
    return {name: place.of(state) for name, place in hf_layout(config).items()}


def from_hf_state(tensors: Mapping[str, Tensor], config: ModelConfig, into: Mapping[str, Tensor]) -> None:
    """Copy tensors of any family's names into the parameters of `into`, a `Transformer.state_dict()`, in place.

    Tensors are asked for one by one, so `tensors` may read them from a file on demand; they are cast to the dtype and
    moved to the device of their place. Names and shapes are the caller's to check, with `hf_layout`.
    """
    for name, place in hf_layout(config, tensors).items():
        place.of(into).copy_(tensors[name])


def hf_layout(config: ModelConfig, names: Container[str] = ()) -> dict[str, Place]:
    """Every tensor on disk and its place, as the names of a file have it or, without them, as an export writes it."""
    places = {"model.embed_tokens.weight": Place("embed_tokens"), "model.norm.weight": Place("norm.weight")}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Place("lm_head.weight")
    q_rows = config.num_attention_heads * config.head_dim
    k_rows = q_rows + config.num_key_value_heads * config.head_dim
    mlp_layout = moe_layout if config.is_moe else dense_layout
    for layer in range(config.num_hidden_layers):
        ours = f"layers.{layer}."
        block = {
            "input_layernorm.weight": Place(ours + "input_layernorm.weight"),
            "self_attn.q_proj.weight": Place(ours + "self_attn.qkv_proj.weight", None, 0, q_rows),
            "self_attn.k_proj.weight": Place(ours + "self_attn.qkv_proj.weight", None, q_rows, k_rows),
            "self_attn.v_proj.weight": Place(ours + "self_attn.qkv_proj.weight", None, k_rows),
            "self_attn.o_proj.weight": Place(ours + "self_attn.o_proj.weight"),
            "post_attention_layernorm.weight": Place(ours + "post_attention_layernorm.weight"),
            **mlp_layout(config, ours + "mlp.", f"model.layers.{layer}.", names),
        }
        places.update({f"model.layers.{layer}.{name}": place for name, place in block.items()})
    return places


def dense_layout(config: ModelConfig, ours: str, theirs: str, names: Container[str]) -> dict[str, Place]:
    width = config.intermediate_size
    return {
        "mlp.gate_proj.weight": Place(ours + "gate_up_proj.weight", None, 0, width),
        "mlp.up_proj.weight": Place(ours + "gate_up_proj.weight", None, width),
        "mlp.down_proj.weight": Place(ours + "down_proj.weight"),
    }


def moe_layout(config: ModelConfig, ours: str, theirs: str, names: Container[str]) -> dict[str, Place]:
    """Mixtral's or GraniteMoeShared's names, in their hub's layout or the fused one of transformers 5."""
    gate = Place(ours + "gate.weight")
    gate_up, down = Place(ours + "experts.gate_up_proj"), Place(ours + "experts.down_proj")
    if theirs + "mlp.experts.gate_up_proj" in names:
        return {"mlp.gate.weight": gate, "mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
    moe, shared = "block_sparse_moe.", {}
    if config.n_shared_experts:
        shared = {
            "shared_mlp.input_linear.weight": Place(ours + "shared_experts.gate_up_proj.weight"),
            "shared_mlp.output_linear.weight": Place(ours + "shared_experts.down_proj.weight"),
        }
    if theirs + moe + "experts.gate_up_proj" in names:
        fused = {moe + "experts.gate_up_proj": gate_up, moe + "experts.down_proj": down}
        return {moe + "router.weight": gate, **fused, **shared}
    if theirs + moe + "input_linear.weight" in names or export_family(config) is GRANITE:
        fused = {moe + "input_linear.weight": gate_up, moe + "output_linear.weight": down}
        return {moe + "router.layer.weight": gate, **fused, **shared}
    places, width = {moe + "gate.weight": gate}, config.expert_size
    for expert in range(config.num_local_experts):
        places[f"{moe}experts.{expert}.w1.weight"] = gate_up._replace(expert=expert, stop=width)
        places[f"{moe}experts.{expert}.w3.weight"] = gate_up._replace(expert=expert, start=width)
        places[f"{moe}experts.{expert}.w2.weight"] = down._replace(expert=expert)
    return places
