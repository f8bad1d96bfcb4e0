"""Small models of every family, and what the tests of Hugging Face directories share."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

import moe_lm
from moe_lm.checkpoint import (
    ModelError,
)
from moe_lm.config import ModelConfig, RopeScaling
from moe_lm.model import Transformer

BOUND = 1e-4
CONTEXT = 64
TEXTS = ["def main():\n    return 0\n", "the quick brown fox, 12345 times\n"]
LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=32)  # fmt: skip
SCALINGS = (None, RopeScaling("linear", factor=3.0), LLAMA3)


def random_config(seed: int) -> ModelConfig:
    """Mixtures, dense models and mixtures with shared experts in turn, every width and option drawn."""
    draw = random.Random(seed)
    kind = ("mixture", "dense", "shared")[seed % 3]
    kv_heads, groups = draw.choice([(1, 6), (1, 4), (2, 3), (2, 2), (3, 1), (5, 1)])
    heads, head_dim = kv_heads * groups, draw.choice([6, 10, 12, 16, 20])
    experts = draw.randint(4, 9)
    mixture = {
        "num_local_experts": experts,
        "num_experts_per_tok": seed // 3 % 4 + 1,
        "moe_intermediate_size": draw.choice([None, draw.randint(20, 60)]),
        "n_shared_experts": draw.randint(1, 3) if kind == "shared" else 0,
        "router_aux_loss_coef": draw.choice([0.0, 0.02]),
        "router_z_loss_coef": draw.choice([0.0, 0.003]),
        "router_jitter_noise": draw.choice([0.0, 0.1]),
    }
    return ModelConfig(
        vocab_size=draw.randint(260, 330),
        hidden_size=heads * head_dim if kind == "shared" else draw.choice([heads * 11, draw.randint(30, 80)]),
        intermediate_size=draw.randint(20, 90),
        num_hidden_layers=draw.randint(1, 3),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        rms_norm_eps=draw.choice([1e-6, 1e-5, 1e-3]),
        rope_theta=draw.choice([500.0, 10000.0, 1e6]),
        rope_scaling=SCALINGS[(seed + seed // 3) % 3],
        tie_word_embeddings=draw.random() < 0.4,
        **(mixture if kind != "dense" else {"num_local_experts": 0}),
    )


CONFIGS = [random_config(seed) for seed in range(20)]
SMALL = {
    "mixture": ModelConfig(
        vocab_size=272, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=CONTEXT,
    ),
    "dense": ModelConfig(
        vocab_size=272, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=0, max_position_embeddings=CONTEXT,
    ),
    "shared": ModelConfig(
        vocab_size=272, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, n_shared_experts=2, max_position_embeddings=CONTEXT,
    ),
}  # fmt: skip


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).reset_parameters().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # weights of ones would hide a norm in the place of another
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def random_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, CONTEXT))


def same_shape(config: ModelConfig) -> ModelConfig:
    """`config` as any file tells it: without what has no effect, the experts' width in intermediate_size if it may."""
    if config.rope_scaling and config.rope_scaling.rope_type == "linear":
        config = dataclasses.replace(config, rope_scaling=RopeScaling("linear", config.rope_scaling.factor))
    if config.routing_layers and len(config.routing_layers) < config.num_hidden_layers:
        width = config.moe_intermediate_size
        return dataclasses.replace(config, moe_intermediate_size=None if width == config.intermediate_size else width)
    width = config.expert_size if config.is_moe else config.intermediate_size
    return dataclasses.replace(config, intermediate_size=width, moe_intermediate_size=None)


def assert_equal_weights(model: Transformer, other: Transformer):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def logit_difference(model: Transformer, other, tokens: torch.Tensor) -> float:
    return (model(tokens) - other(tokens).logits).abs().max().item()


def open_in_transformers(directory: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def foreign(family: str, **settings):
    """A random model of transformers' class `family`, its norms drawn too."""
    import transformers

    shape = {
        "vocab_size": 150, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**shape, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def edit(directory: Path, remove: tuple[str, ...] = (), **changes):
    file = directory / "config.json"
    settings = {**json.loads(file.read_text("utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in remove}), "utf-8")


def refusal(path: Path | str, **arguments) -> str:
    with pytest.raises(ModelError) as caught:
        moe_lm.load(path, **arguments)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence
