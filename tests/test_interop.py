"""Models on disk against the transformers library, which is only imported here and in hub_models."""

import dataclasses
import json

import pytest
import torch
from hub_models import (
    BOUND,
    CONFIGS,
    CONTEXT,
    LLAMA3,
    SCALINGS,
    SMALL,
    TEXTS,
    assert_equal_weights,
    edit,
    foreign,
    logit_difference,
    open_in_transformers,
    random_model,
    random_tokens,
    same_shape,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moe_lm
from moe_lm.checkpoint import (
    ModelError,
    from_hf_state,
    load_state,
    save_hf,
    to_hf_config,
    to_hf_state,
)
from moe_lm.config import ConfigError
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.moe import expert_counts

pytestmark = pytest.mark.usefixtures("offline", "one_thread")


# Our models in transformers


def test_the_drawn_configurations_cover_every_option():
    families = {tuple(to_hf_config(config, dtype=torch.float32)["architectures"]) for config in CONFIGS}
    assert families == {(f"{name}ForCausalLM",) for name in ("Mixtral", "Llama", "Mistral", "GraniteMoeShared")}
    queries = {config.num_attention_heads // config.num_key_value_heads for config in CONFIGS}
    assert {config.num_key_value_heads == 1 for config in CONFIGS} == {True, False}
    assert 1 in queries
    assert len(queries) > 2
    moe = [config for config in CONFIGS if config.is_moe]
    assert {config.num_experts_per_tok for config in moe} == {1, 2, 3, 4}
    assert {config.rope_scaling for config in moe} == set(SCALINGS)
    assert {config.rope_scaling for config in CONFIGS if not config.is_moe} == set(SCALINGS)
    assert {config.tie_word_embeddings for config in CONFIGS} == {True, False}
    assert any(config.moe_intermediate_size for config in moe)
    assert any(config.head_dim * config.num_attention_heads != config.hidden_size for config in moe)


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_transformers_computes_our_logits(seed, tmp_path, tokenizer):
    config = CONFIGS[seed]
    model, tokens = random_model(config), random_tokens(config.vocab_size)
    with torch.no_grad():
        logits = model(tokens)
        positions = torch.arange(CONTEXT).expand(tokens.shape)
        routings = model.hidden_states(tokens, positions, whole_rows())[1]
    assert logits.std() > 0.7
    assert all((expert_counts(routed.routing) > 0).sum() > config.num_local_experts / 2 for routed in routings)
    save_hf(tmp_path, model, tokenizer)
    other = open_in_transformers(tmp_path)
    assert other.dtype == torch.float32
    assert logit_difference(model, other, tokens) < BOUND
    loaded = moe_lm.load(tmp_path)
    assert_equal_weights(model, loaded)
    assert loaded.config == same_shape(config)


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 9000.0}, {"rms_norm_eps": 1e-2}, {"rope_scaling": None}, {"rope_scaling": SCALINGS[1]},
     {"num_experts_per_tok": 3}],
)  # fmt: skip
def test_the_bound_notices_one_wrong_setting(change, tmp_path, tokenizer):
    config = dataclasses.replace(SMALL["mixture"], initializer_range=0.2, rope_scaling=LLAMA3)
    model = random_model(config)
    save_hf(tmp_path, model, tokenizer)
    changed = Transformer(dataclasses.replace(config, **change))
    changed.load_state_dict(model.state_dict())
    assert logit_difference(changed, open_in_transformers(tmp_path), random_tokens(config.vocab_size)) > 10 * BOUND


def test_the_export_is_what_the_hub_has_of_the_family(tmp_path, tokenizer):
    save_hf(tmp_path, random_model(SMALL["mixture"]), tokenizer, dtype=torch.bfloat16)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    expected = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": CONTEXT, "sliding_window": None,
        "rope_theta": 10000.0, "rope_scaling": None, "router_aux_loss_coef": 0.01, "output_router_logits": False,
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 8,
    }  # fmt: skip
    assert settings.items() >= expected.items()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    layer = "model.layers.1."
    assert shapes[layer + "block_sparse_moe.gate.weight"] == [4, 32]
    assert shapes[layer + "block_sparse_moe.experts.3.w1.weight"] == [24, 32]
    assert shapes[layer + "block_sparse_moe.experts.3.w2.weight"] == [32, 24]
    assert shapes[layer + "self_attn.k_proj.weight"] == [16, 32]
    assert len(shapes) == 3 + 2 * (2 + 4 + 1 + 3 * 4)
    generation = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True}


def test_transformers_takes_its_fast_path_where_the_widths_allow_it():
    settings = to_hf_config(SMALL["mixture"], dtype=torch.float32)
    assert "experts_implementation" not in settings
    narrow = dataclasses.replace(SMALL["mixture"], moe_intermediate_size=20)
    assert to_hf_config(narrow, dtype=torch.float32)["experts_implementation"] == "eager"


def test_the_tokenizer_is_the_same_in_transformers(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    save_hf(tmp_path, random_model(SMALL["dense"]), tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "  Grüße,\r\n\t日本<|endoftext|>x"]:
        assert other(text).input_ids == tokenizer.encode(text).ids == moe_lm.load_tokenizer(tmp_path).encode(text).ids
    assert other.eos_token_id == other.bos_token_id == 0
    assert other.model_max_length == CONTEXT


def test_a_tokenizer_that_the_embedding_has_no_rows_for_is_refused(tmp_path, tokenizer):
    model = random_model(dataclasses.replace(SMALL["dense"], vocab_size=258))
    with pytest.raises(
        ConfigError, match=r"^the tokenizer has 260 entries and model\.vocab_size = 258 rows for them: "
    ):
        save_hf(tmp_path, model, tokenizer)
    assert not list(tmp_path.iterdir())


# Models of transformers in ours


FOREIGN = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}, {}),
    "mixtral, fused": ("Mixtral", {"head_dim": 12}, {"save_original_format": False}),
    "mixtral, sharded": ("Mixtral", {"num_key_value_heads": 1}, {"max_shard_size": "50KB"}),
    "mistral": ("Mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}, {}),
    "mistral, wide window": ("Mistral", {"sliding_window": CONTEXT, "head_dim": 10}, {}),
    "llama": ("Llama", {"num_key_value_heads": 6}, {}),
    "llama, tied, llama3": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
        {},
    ),
    "llama, linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, {},
    ),
    "granite": (
        "GraniteMoeShared",
        {"shared_intermediate_size": 80, "attention_multiplier": 8**-0.5, "num_local_experts": 5}, {},
    ),
    "granite, fused": (
        "GraniteMoeShared", {"shared_intermediate_size": 40, "attention_multiplier": 8**-0.5},
        {"save_original_format": False},
    ),
    "granite, none shared": (
        "GraniteMoeShared", {"shared_intermediate_size": 0, "attention_multiplier": 8**-0.5}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_we_compute_the_logits_of_transformers(case, tmp_path):
    family, settings, saving = FOREIGN[case]
    other = foreign(family, **settings)
    other.save_pretrained(tmp_path, **saving)
    assert ("sharded" in case) == (tmp_path / "model.safetensors.index.json").is_file()
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text("utf-8"))
    model = moe_lm.load(tmp_path)
    tokens = random_tokens(150)
    with torch.no_grad():
        assert model(tokens).std() > 0.7
    assert logit_difference(model, other, tokens) < BOUND
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}])
def test_files_of_transformers_4_and_older(scaling, tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0} if scaling else {"rope_type": "default"}
    other = foreign("Llama", num_key_value_heads=6, rope_parameters={**rope, "rope_theta": 3000.0})
    other.save_pretrained(tmp_path)
    newer = ("rope_parameters", "head_dim", "num_key_value_heads", "dtype", "mlp_bias", "attention_bias")
    edit(tmp_path, remove=newer, rope_theta=3000, rope_scaling=scaling, torch_dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = moe_lm.load(tmp_path)
    assert model.config.num_key_value_heads == 6
    assert logit_difference(model, other, random_tokens(150)) < BOUND


def test_a_tied_model_whose_file_repeats_the_embedding(tmp_path):
    other = foreign("Llama", tie_word_embeddings=True)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert logit_difference(moe_lm.load(tmp_path), other, random_tokens(150)) < BOUND
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"holds an lm_head\.weight other than its embedding"):
        moe_lm.load(tmp_path)


# Round trips


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saving_in_a_dtype(name, dtype, tmp_path, tokenizer):
    model = random_model(SMALL[name])
    save_hf(tmp_path, model, tokenizer, dtype=dtype)
    assert_equal_weights(model.to(dtype), moe_lm.load(tmp_path))
    assert {p.dtype for p in moe_lm.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    other = open_in_transformers(tmp_path)
    assert other.dtype == dtype
    if dtype == torch.bfloat16:
        with torch.no_grad():
            assert other(random_tokens(272)).logits.isfinite().all()


def test_a_file_of_two_dtypes_loads_in_the_wider(tmp_path, tokenizer):
    save_hf(tmp_path, random_model(SMALL["mixture"]), tokenizer, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = tensors[
        "model.layers.0.block_sparse_moe.gate.weight"
    ].float()
    save_file(tensors, tmp_path / "model.safetensors")
    assert {parameter.dtype for parameter in moe_lm.load(tmp_path).parameters()} == {torch.float32}


def test_saving_does_not_touch_the_model(tmp_path, tokenizer):
    model = random_model(SMALL["mixture"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_hf(tmp_path, model, tokenizer, dtype=torch.bfloat16)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_loading_into_a_model_keeps_its_parameters_and_dtype(tmp_path, tokenizer):
    model, other = random_model(SMALL["shared"]), random_model(SMALL["shared"])
    parameters = list(other.parameters())
    save_hf(tmp_path, model, tokenizer)
    load_state(tmp_path, other)
    assert_equal_weights(model, other)
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    deeper = random_model(dataclasses.replace(SMALL["shared"], num_hidden_layers=3))
    with pytest.raises(ModelError, match=r"lacks 11 tensors \(model\.layers\.2\.input_layernorm\.weight, "):
        load_state(tmp_path, deeper)


@pytest.mark.parametrize("name", SMALL)
def test_the_names_of_the_hub_and_back(name):
    model, other = random_model(SMALL[name]), random_model(SMALL[name])
    tensors = to_hf_state(model.state_dict(), SMALL[name])
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers == sum(parameter.numel() for parameter in model.parameters())
    from_hf_state(tensors, SMALL[name], other.state_dict())
    assert_equal_weights(model, other)
