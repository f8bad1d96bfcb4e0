"""Models on disk against the transformers library, which is only imported here."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moe_lm
from moe_lm.checkpoint import (
    ModelError,
    check_exportable,
    from_hf_config,
    from_hf_state,
    load_state,
    resolve_model_dir,
    save_hf,
    to_hf_config,
    to_hf_state,
)
from moe_lm.config import ConfigError, ModelConfig, RopeScaling
from moe_lm.data.tokenizer import train_tokenizer
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.moe import expert_counts

BOUND = 1e-4
CONTEXT = 64
TEXTS = ["def main():\n    return 0\n", "the quick brown fox, 12345 times\n"]
LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=32)  # fmt: skip
SCALINGS = (None, RopeScaling("linear", factor=3.0), LLAMA3)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Products this small take longer to hand out than to compute, several times so on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 2, 260)


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
    """`config` as any file tells it: without what has no effect, the experts' width in intermediate_size."""
    if config.rope_scaling and config.rope_scaling.rope_type == "linear":
        config = dataclasses.replace(config, rope_scaling=RopeScaling("linear", config.rope_scaling.factor))
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


# What is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("saved")
    for name, config in SMALL.items():
        (directory / name).mkdir()
        save_hf(directory / name, random_model(config), tokenizer)
    (directory / "mistral").mkdir()
    save_hf(
        directory / "mistral", random_model(dataclasses.replace(SMALL["dense"], hidden_size=34, head_dim=8)), tokenizer
    )
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    def make(name: str) -> Path:
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return make


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


ROPE = "rope_scaling"
REFUSED = [
    ("mixture", {"sliding_window": 32},
     "sliding_window = 32 must be null or at least max_position_embeddings = 64: moe-lm attends to the whole context."),
    ("mixture", {"architectures": ["Qwen2ForCausalLM"]},
     "architecture 'Qwen2ForCausalLM' is not one that moe-lm opens: MixtralForCausalLM, MistralForCausalLM, "
     "LlamaForCausalLM, GraniteMoeSharedForCausalLM."),
    ("mixture", {"architectures": None, "model_type": "gpt2"},
     "architecture 'gpt2' is not one that moe-lm opens: MixtralForCausalLM, MistralForCausalLM, LlamaForCausalLM, "
     "GraniteMoeSharedForCausalLM."),
    ("dense", {"quantization_config": {"bits": 4}},
     "quantization_config is set, and moe-lm opens no quantized weights: name the model in float32, float16 or "
     "bfloat16."),
    ("dense", {"attention_bias": True}, "attention_bias = True must be False: moe-lm's model computes nothing else."),
    ("dense", {"mlp_bias": True}, "mlp_bias = True must be False: moe-lm's model computes nothing else."),
    ("mixture", {"hidden_act": "gelu"}, "hidden_act = 'gelu' must be 'silu': moe-lm's model computes nothing else."),
    ("shared", {"residual_multiplier": 0.2},
     "residual_multiplier = 0.2 must be 1.0: moe-lm's model computes nothing else."),
    ("shared", {"attention_multiplier": 0.5},
     f"attention_multiplier = 0.5 must be 1 / sqrt(head_dim) = {8**-0.5}."),
    ("shared", {"shared_intermediate_size": 50},
     "shared_intermediate_size = 50 must be a multiple of intermediate_size = 24: moe-lm's shared experts are as wide "
     "as the routed ones."),
    ("dense", {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types = ['full_attention', 'sliding_attention'] must be full_attention in every layer."),
    ("dense", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 must be 1: moe-lm rotates whole heads."),
    ("dense", {ROPE: {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}},
     "partial_rotary_factor = 0.25 must be 1: moe-lm rotates whole heads."),
    *[("dense", {ROPE: {"type": kind, "factor": 2.0}},
       f"rope type '{kind}' is not one that moe-lm computes: default, linear, llama3.")
      for kind in ("dynamic", "yarn", "longrope", "su")],
    ("dense", {ROPE: None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
     "rope type 'yarn' is not one that moe-lm computes: default, linear, llama3."),
    ("dense", {ROPE: {"rope_type": "llama3", "low_freq_factor": 1.0}},
     "rope type 'llama3' lacks factor, high_freq_factor."),
    ("dense", {ROPE: {"full_attention": {"rope_type": "default"}}},
     "rope parameters {'full_attention': {'rope_type': 'default'}} must be one flat table: moe-lm rotates alike in "
     "every layer."),
    ("dense", {"hidden_size": None}, "hidden_size is not given, and a model has no shape without it."),
    ("dense", {"num_hidden_layers": "2"}, "num_hidden_layers = '2' must be a whole number."),
    ("dense", {"num_key_value_heads": 3},
     "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3; choose a divisor of 4."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "sentence"), REFUSED)
def test_a_variation_that_we_do_not_compute_is_refused(name, changes, sentence, copy):
    directory = copy(name)
    edit(directory, **changes)
    assert refusal(directory) == f"{directory / 'config.json'}: {sentence}"


def test_mistral_without_the_key_has_its_window_of_4096(copy):
    directory = copy("mistral")
    assert moe_lm.load(directory).config.head_dim == 8
    edit(directory, remove=("sliding_window",))
    moe_lm.load(directory)
    edit(directory, max_position_embeddings=4097)
    assert "sliding_window = 4096 must be null or at least max_position_embeddings = 4097" in refusal(directory)


def rewrite(directory: Path, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_tensors_that_are_not_the_models_are_refused(copy):
    directory = copy("mixture")
    gone = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)]
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in gone])
    assert refusal(directory) == (
        f"{directory} lacks 4 tensors ({', '.join(gone[:3])} and 1 more) that the model has: complete the files or "
        "correct the config."
    )
    directory = copy("dense")
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert refusal(directory) == (
        f"{directory} holds 1 tensor (model.layers.0.self_attn.q_proj.bias) that the model does not have: correct the "
        "config."
    )
    directory = copy("shared")
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert refusal(directory) == (
        f"{directory} has 1 tensor (model.norm.weight [31] in place of [32]): correct the config."
    )
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    sentence = f"{directory}: tensor model.norm.weight has dtype I8, which must be one of F64, F32, F16, BF16."
    assert refusal(directory) == sentence
    assert refusal(directory, dtype=torch.float32) == sentence


def test_files_that_are_missing_or_damaged_are_refused(copy):
    directory = copy("dense")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(directory).startswith(f"{weights} is damaged or incomplete (")
    weights.unlink()
    assert refusal(directory) == (
        f"{directory} has a config.json but no weights: model.safetensors or model.safetensors.index.json is needed."
    )
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert refusal(directory) == (
        f"{directory} has its weights as pickles only (pytorch_model.bin), which run code when they are opened: name "
        "a model saved as safetensors, as save_pretrained of transformers does."
    )
    index = directory / "model.safetensors.index.json"
    for name in ("model-00001-of-00002.safetensors", "../mixture/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}), "utf-8")
        assert refusal(directory) == (
            f"{index} names {Path(name).name}, which is not in {directory}: download it again."
        )
    index.write_text("{}", "utf-8")
    assert refusal(directory) == f"{index} has no table weight_map of file names: download it again."
    (directory / "config.json").write_text("{", "utf-8")
    assert refusal(directory).startswith(f"{directory / 'config.json'} cannot be read as JSON: ")
    (directory / "config.json").write_text("[]", "utf-8")
    assert refusal(directory) == f"{directory / 'config.json'} must hold a JSON object, not a list."


# Paths


def test_a_run_directory_means_its_newest_complete_checkpoint(copy, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert refusal(run) == f"{run} has no complete checkpoint under checkpoints/ yet: let the run reach its first."
    for step in ("step-000900", "step-001000", ".unfinished-step-002000"):
        shutil.copytree(copy("dense"), run / "checkpoints" / step)
        shutil.rmtree(tmp_path / "dense")
    newest = run / "checkpoints" / "step-001000"
    assert resolve_model_dir(run) == resolve_model_dir(str(newest)) == newest
    assert_equal_weights(moe_lm.load(run), moe_lm.load(newest))
    for path in (run, newest, newest / "tokenizer.json"):
        assert moe_lm.load_tokenizer(path).get_vocab_size() == 260


def test_paths_that_are_no_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path / "gone") == (
        f"there is no directory {tmp_path / 'gone'}: name a model, a checkpoint or a run."
    )
    assert refusal("mistralai/Mixtral-8x7B-v0.1") == (
        "there is no directory mistralai/Mixtral-8x7B-v0.1: name a model, a checkpoint or a run, and a model of the "
        "hub is downloaded first: hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIRECTORY."
    )
    assert refusal(tmp_path) == (
        f"{tmp_path} has neither a config.json nor checkpoints/: name a model, a checkpoint or a run."
    )
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} is a file: name the directory that holds it."


# The config and the package


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_a_config_survives_its_file(seed):
    config = CONFIGS[seed]
    settings = json.loads(json.dumps(to_hf_config(config, dtype=torch.float32)))
    assert from_hf_config(settings) == same_shape(config)
    assert to_hf_config(from_hf_config(settings), dtype=torch.float32) == settings


def test_keys_that_a_file_leaves_out_are_what_transformers_takes_them_for():
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {"architectures": ["MixtralForCausalLM"], **dict.fromkeys(shape, 32), "num_attention_heads": 16}
    from transformers import MixtralConfig

    for extra in ({}, {"num_key_value_heads": 4, "head_dim": None}):
        ours, theirs = from_hf_config({**settings, **extra}), MixtralConfig(**{**settings, **extra})
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 1e6
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert (ours.num_local_experts, ours.num_experts_per_tok) == (8, 2)
    # transformers 5 refuses the null that 4 took for multi-head attention.
    assert from_hf_config({**settings, "num_key_value_heads": None}).num_key_value_heads == 16
    llama = from_hf_config({**settings, "architectures": ["LlamaForCausalLM"]})
    assert (llama.num_key_value_heads, llama.rms_norm_eps, llama.rope_theta) == (16, 1e-6, 10000.0)


def test_what_no_family_holds_is_told_before_training():
    for config in SMALL.values():
        check_exportable(config)
    with pytest.raises(ConfigError, match=r"^model\.head_dim = 16 must be hidden_size / num_attention_heads = 32 / 4 "):
        check_exportable(dataclasses.replace(SMALL["shared"], head_dim=16))
    with pytest.raises(ConfigError, match=r"^model\.initializer_range = 1\.5 must be at most 1 in a dense model"):
        check_exportable(dataclasses.replace(SMALL["dense"], initializer_range=1.5))


def test_importing_the_package_imports_no_torch():
    code = "import sys, moe_lm; assert not {'torch', 'transformers'} & set(sys.modules); assert 'load' in dir(moe_lm)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        _ = moe_lm.loud


def test_loading_imports_no_transformers(saved):
    code = f"import sys, moe_lm; moe_lm.load({str(saved / 'mixture')!r}); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_version_is_that_of_the_packaging():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert moe_lm.__version__ == project["version"]
