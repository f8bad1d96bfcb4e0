"""The shards of moe_lm.scaling.shards against the model itself, built on the meta device: the one file here with torch.

What a rank holds is cut out of the real state dict, tensor by tensor, by the arithmetic of a loader rather than by the
closed form; nothing of moe_lm.scaling.shards is used for it.
"""

import torch
from torch import Tensor

from moe_lm.config import ModelConfig, require
from moe_lm.model import Transformer
from moe_lm.scaling.layout import Stage, require_tensor_parallel, stages
from moe_lm.scaling.shards import VOCABULARY_TILE, held


def check(model: ModelConfig, tp: int, pp: int, ep: int) -> tuple[str, ...]:
    """Where the closed form and the cut state dict differ, one sentence per weight and rank; empty where they agree.

    Every tensor-parallel, pipeline and expert-parallel rank is compared, name by name and shape by shape. Raises
    ConfigError for a model that moe_lm.model does not build, and for sizes that do not divide.
    """
    state = meta_state(model)
    require_tensor_parallel(model, tp, "tp")
    shared = model.num_local_experts if model.is_moe else 1
    require(shared % ep == 0, f"ep = {ep} does not divide model.num_local_experts = {model.num_local_experts}.")
    differences = []
    for number, stage in enumerate(stages(model, pp)):
        expected = held(model, tp, stage, ep)
        for tp_rank in range(tp):
            for ep_rank in range(ep):
                cut = shard(state, model, stage, tp, tp_rank, ep, ep_rank)
                found = {name: tuple(tensor.shape) for name, tensor in cut.items()}
                differences += [
                    f"{name} on stage {number}, tensor rank {tp_rank}, expert rank {ep_rank}: "
                    f"{expected.get(name)} by closed form, {found.get(name)} cut from the model."
                    for name in sorted(expected.keys() | found.keys())
                    if expected.get(name) != found.get(name)
                ]
    return tuple(differences)


def sharded_bytes(model: ModelConfig, tp: int, pp: int, ep: int) -> tuple[int, ...]:
    """Bytes of the bfloat16 weights on the ranks of each stage, from the cut state dict; all its ranks hold as many."""
    state = meta_state(model)
    sizes = []
    for stage in stages(model, pp):
        ranks = {
            sum(tensor.nbytes for tensor in shard(state, model, stage, tp, tp_rank, ep, ep_rank).values())
            for tp_rank in range(tp)
            for ep_rank in range(ep)
        }
        assert len(ranks) == 1, f"ranks of one stage hold {sorted(ranks)} bytes"
        sizes.append(ranks.pop())
    return tuple(sizes)


def meta_state(model: ModelConfig) -> dict[str, Tensor]:
    """The bfloat16 state dict of the model, without memory. Raises ConfigError where moe_lm.model does not build it."""
    kinds = ", ".join(model.only_planned)
    require(not kinds, f"model.{kinds} is counted in closed form only: moe_lm.model does not build it, so nothing is "
                       "there to compare with.")  # fmt: skip
    with torch.device("meta"):
        return Transformer(model).to(torch.bfloat16).state_dict()


def shard(
    state: dict[str, Tensor], model: ModelConfig, stage: Stage, tp: int, tp_rank: int, ep: int, ep_rank: int
) -> dict[str, Tensor]:
    """The part of `state` that one rank loads, as views of its tensors where nothing is padded or joined."""
    heads = [model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads]

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name in ("embed_tokens", "lm_head.weight"):
            rows = len(tensor)
            if rows % tp:
                padding = -rows % (tp * VOCABULARY_TILE)
                tensor = joined([tensor, tensor.new_empty(padding, model.hidden_size)])
            return tensor.chunk(tp)[tp_rank]
        if name.endswith("qkv_proj.weight"):
            return joined([
                part[tp_rank * count // tp:][: max(1, count // tp)].flatten(0, 1)
                for part, count in zip(tensor.unflatten(0, (-1, model.head_dim)).split(heads), heads, strict=True)
            ])  # fmt: skip
        if name.endswith("gate_up_proj.weight"):  # gate rows before up rows, each cut for itself
            return joined([half.chunk(tp)[tp_rank] for half in tensor.chunk(2)])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(tp, dim=1)[tp_rank]
        if name.endswith("mlp.experts.gate_up_proj"):
            gate, up = tensor.chunk(ep)[ep_rank].chunk(2, dim=1)
            return joined([gate.chunk(tp, dim=1)[tp_rank], up.chunk(tp, dim=1)[tp_rank]], dim=1)
        if name.endswith("mlp.experts.down_proj"):
            return tensor.chunk(ep)[ep_rank].chunk(tp, dim=2)[tp_rank]
        assert name.endswith(("norm.weight", "mlp.gate.weight")), f"no rule cuts {name}"
        return tensor

    prefixes = tuple(f"layers.{layer}." for layer in stage.layers)
    ends = [name for name, there in {
        "embed_tokens": stage.embedding or (stage.output and model.tie_word_embeddings),
        "norm.weight": stage.output,
        "lm_head.weight": stage.output and not model.tie_word_embeddings,
    }.items() if there]  # fmt: skip
    return {name: cut(name, tensor) for name, tensor in state.items() if name in ends or name.startswith(prefixes)}


def joined(pieces: list[Tensor], dim: int = 0) -> Tensor:
    """What torch.cat gives; on the meta device that would import torch's compiler, which takes seconds."""
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    return pieces[0].new_empty(shape)
