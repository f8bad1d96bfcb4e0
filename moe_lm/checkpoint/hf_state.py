"""The weights under the names that the hub gives them.

The hub keeps queries, keys and values apart, gate and up apart, and most families every expert apart; `Transformer` has
each of these groups as one parameter. One table, `hf_layout`, says which rows of which tensor of ours a tensor on disk
is, and serves both ways.
"""

from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import Tensor

from moe_lm.checkpoint.hf_family import ERNIE, GRANITE, QWEN2, Family, export_family
from moe_lm.config import ModelConfig

CORRECTION = "e_score_correction_bias"
"""The end of the name of every bias on the choice of experts, here and on disk: float32 whatever the weights are."""
BIASES = (f"mlp.moe_statics.{CORRECTION}", f"mlp.gate.moe_statics.{CORRECTION}")
"""Ernie4_5_Moe's, in every layer that routes: on the hub, and in the layout of transformers 5."""
GATE = "mlp.shared_expert_gate.weight"
"""Qwen2Moe's, in every layer that routes."""
FUSED = "mlp.experts.gate_up_proj"
"""All experts in one tensor, in the layout of transformers 5."""


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
    head_dim: int | None = None
    """Rows of a head whose rotated pairs are neighbours on disk and half a head apart in memory; None for no such."""
    factor: float = 1.0
    """The tensor on disk is this multiple of the one in memory, a power of two, so that nothing is rounded."""
    lead: bool = False
    """Whether there is an axis of one in front on disk."""

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """A view of this place; with `head_dim` (heads, pairs, 2, D), in the order on disk."""
        tensor = state[self.parameter]
        tensor = (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]
        return tensor if self.head_dim is None else tensor.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor as it is on disk, a view where rows and factor allow it."""
        tensor = self.of(state)
        tensor = tensor if self.head_dim is None else tensor.flatten(0, 2)
        tensor = tensor if self.factor == 1 else tensor * self.factor
        return tensor[None] if self.lead else tensor

    def write(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy a tensor as it is on disk into this place, cast to its dtype and moved to its device."""
        place = self.of(state)
        place.copy_(tensor.reshape(place.shape))
        if self.factor != 1:
            place.div_(self.factor)


def to_hf_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a `Transformer.state_dict()` under the names of the family that `config` is exported as.

    They are views where the family keeps rows as they are. A tied output projection has no tensor of its own, neither
    here nor on disk.
    """
    tensors = {name: place.read(state) for name, place in hf_layout(config).items()}
    weight = state["embed_tokens"]
    zeros = {name: weight.new_zeros(shape) for name, shape in hf_zeros(config).items()}
    return {**tensors, **zeros}


def from_hf_state(tensors: Mapping[str, Tensor], config: ModelConfig, into: Mapping[str, Tensor]) -> None:
    """Copy tensors of any family's names into the parameters of `into`, a `Transformer.state_dict()`, in place.

    Tensors are asked for one by one, so `tensors` may read them from a file on demand; they are cast to the dtype and
    moved to the device of their place. Names and shapes are the caller's to check, with `hf_layout` and `hf_zeros`.
    """
    for name, place in hf_layout(config, tensors).items():
        place.write(tensors[name], into)


def layout_family(config: ModelConfig, names: Container[str]) -> Family:
    """Whose layout the tensors `names` are in; that of an export where they do not tell, or there are none."""
    for layer in config.routing_layers:
        theirs = f"model.layers.{layer}."
        if any(theirs + bias in names for bias in BIASES):
            return ERNIE
        if theirs + GATE in names:
            return QWEN2
    return export_family(config)


def hf_layout(config: ModelConfig, names: Container[str] = ()) -> dict[str, Place]:
    """Every tensor on disk and its place, as the names of a file have it or, without them, as an export writes it.

    Those that the family has and `Transformer` has not are in `hf_zeros`.
    """
    family = layout_family(config, names)
    places = {"model.embed_tokens.weight": Place("embed_tokens"), "model.norm.weight": Place("norm.weight")}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Place("lm_head.weight")
    q_rows = config.num_attention_heads * config.head_dim
    k_rows = q_rows + config.num_key_value_heads * config.head_dim
    head_dim = config.head_dim if family is ERNIE else None
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = ours + "self_attn.qkv_proj.weight"
        block = {
            "input_layernorm.weight": Place(ours + "input_layernorm.weight"),
            "self_attn.q_proj.weight": Place(qkv, None, 0, q_rows, head_dim),
            "self_attn.k_proj.weight": Place(qkv, None, q_rows, k_rows, head_dim),
            "self_attn.v_proj.weight": Place(qkv, None, k_rows),
            "self_attn.o_proj.weight": Place(ours + "self_attn.o_proj.weight"),
            "post_attention_layernorm.weight": Place(ours + "post_attention_layernorm.weight"),
        }
        if not config.routes(layer):
            block |= swiglu("mlp.", ours + "mlp.", config.intermediate_size)
        elif family in (ERNIE, QWEN2):
            block |= mixed_layout(config, family, ours + "mlp.", theirs, names)
        else:
            block |= moe_layout(config, ours + "mlp.", theirs, names)
        places.update({theirs + name: place for name, place in block.items()})
    return places


def hf_zeros(config: ModelConfig, names: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Tensors on disk that `Transformer` has not, by name with their shapes: each must be zero, for it changes nothing.

    They are Ernie4_5_Moe's bias where the choice of experts has none, Qwen2Moe's gate of the shared experts (the
    sigmoid of zero is one half, which the factor of their output projection takes back), and its shared expert of width
    0 where there is none.
    """
    family, zeros = layout_family(config, names), {}
    for layer in config.routing_layers:
        theirs = f"model.layers.{layer}."
        if family is ERNIE and not config.router_bias_update_rate:
            zeros[theirs + bias_name(theirs, names)] = (1, config.num_local_experts)
        if family is QWEN2:
            zeros[theirs + GATE] = (1, config.hidden_size)
            if not config.n_shared_experts:
                shared = theirs + "mlp.shared_expert."
                zeros |= {shared + f"{part}_proj.weight": (0, config.hidden_size) for part in ("gate", "up")}
                zeros[shared + "down_proj.weight"] = (config.hidden_size, 0)
    return zeros


def bias_name(theirs: str, names: Container[str]) -> str:
    return next((bias for bias in BIASES if theirs + bias in names), BIASES[0])


def swiglu(theirs: str, ours: str, width: int, factor: float = 1.0) -> dict[str, Place]:
    """An MLP whose gate and up are apart on disk."""
    return {
        theirs + "gate_proj.weight": Place(ours + "gate_up_proj.weight", None, 0, width),
        theirs + "up_proj.weight": Place(ours + "gate_up_proj.weight", None, width),
        theirs + "down_proj.weight": Place(ours + "down_proj.weight", factor=factor),
    }


def mixed_layout(
    config: ModelConfig, family: Family, ours: str, theirs: str, names: Container[str]
) -> dict[str, Place]:
    """Ernie4_5_Moe's or Qwen2Moe's names of a layer that routes, in the hub's layout or transformers 5's."""
    places, width = {"mlp.gate.weight": Place(ours + "gate.weight")}, config.expert_size
    if config.router_bias_update_rate:
        places[bias_name(theirs, names)] = Place(ours + CORRECTION, lead=True)
    gate_up, down = Place(ours + "experts.gate_up_proj"), Place(ours + "experts.down_proj")
    if theirs + FUSED in names:
        places |= {FUSED: gate_up, "mlp.experts.down_proj": down}
    else:
        for expert in range(config.num_local_experts):
            name = f"mlp.experts.{expert}."
            places[name + "gate_proj.weight"] = gate_up._replace(expert=expert, stop=width)
            places[name + "up_proj.weight"] = gate_up._replace(expert=expert, start=width)
            places[name + "down_proj.weight"] = down._replace(expert=expert)
    if config.n_shared_experts:
        name, factor = ("mlp.shared_experts.", 1.0) if family is ERNIE else ("mlp.shared_expert.", 2.0)
        places |= swiglu(name, ours + "shared_experts.", width * config.n_shared_experts, factor)
    return places


def moe_layout(config: ModelConfig, ours: str, theirs: str, names: Container[str]) -> dict[str, Place]:
    """Mixtral's or GraniteMoeShared's names, in their hub's layout or the fused one of transformers 5."""
    gate = Place(ours + "gate.weight")
    gate_up, down = Place(ours + "experts.gate_up_proj"), Place(ours + "experts.down_proj")
    if theirs + FUSED in names:
        return {"mlp.gate.weight": gate, FUSED: gate_up, "mlp.experts.down_proj": down}
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
