"""The two families of what Mixtral cannot hold, against the transformers library: Ernie4_5_Moe and Qwen2Moe."""

import dataclasses
import json

import pytest
import torch
from hub_models import (
    BOUND,
    CONTEXT,
    LLAMA3,
    SCALINGS,
    assert_equal_weights,
    edit,
    foreign,
    logit_difference,
    open_in_transformers,
    random_model,
    random_tokens,
    refusal,
    same_shape,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import EVERYTHING, assert_same_outcome, at_step, fresh_process, tiny_config

import moe_lm
from moe_lm.checkpoint import check_exportable, from_hf_config, load_state, save_hf, to_hf_config
from moe_lm.checkpoint.hf_state import CORRECTION
from moe_lm.config import ConfigError, ModelConfig
from moe_lm.model import Transformer
from moe_lm.train import Trainer

pytestmark = [
    pytest.mark.usefixtures("offline", "one_thread"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # Qwen2Moe's shared expert of width 0
]

SHAPE = {
    "vocab_size": 273, "hidden_size": 40, "intermediate_size": 50, "moe_intermediate_size": 22, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14, "num_local_experts": 6,
    "num_experts_per_tok": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "rope_theta": 500.0,
}  # fmt: skip
GROUPED = {"moe_intermediate_size": 24}
"""A width that transformers' grouped GEMM takes."""
BIASED = {"router_bias_update_rate": 1e-3}
PLAIN = {"norm_topk_prob": False}
EVERY_SECOND = {"expert_layer_period": 2, "expert_layer_offset": 1}
FROM_THE_FIRST = {"expert_layer_period": 2, "expert_layer_offset": 0}
CASES = {
    "first dense": ("Ernie4_5_Moe", {"first_k_dense_replace": 1}),
    "first two dense, shared": ("Ernie4_5_Moe", {"first_k_dense_replace": 2, "n_shared_experts": 2}),
    "every second": ("Ernie4_5_Moe", {**EVERY_SECOND, **GROUPED, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "every second after the first three": (
        "Ernie4_5_Moe", {**EVERY_SECOND, "first_k_dense_replace": 3, "num_key_value_heads": 3},
    ),
    "shared, heads of their own width": (
        "Ernie4_5_Moe", {"n_shared_experts": 1, "moe_intermediate_size": None, "num_key_value_heads": 3},
    ),
    "bias": ("Ernie4_5_Moe", {**BIASED, "head_dim": 20}),
    "bias, first dense, shared": (
        "Ernie4_5_Moe", {**BIASED, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 3},
    ),
    "bias, every second, top-1": ("Ernie4_5_Moe", {**BIASED, **EVERY_SECOND, "num_experts_per_tok": 1}),
    "every second from the first": ("Qwen2Moe", {**FROM_THE_FIRST, "rope_scaling": SCALINGS[1]}),
    "every second from the first, shared": ("Qwen2Moe", {**FROM_THE_FIRST, "n_shared_experts": 2}),
    "not normalised": ("Qwen2Moe", {**PLAIN, "moe_intermediate_size": None, "num_key_value_heads": 3}),
    "not normalised, top-1": ("Qwen2Moe", {**PLAIN, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "not normalised, first dense, shared": (
        "Qwen2Moe", {**PLAIN, "first_k_dense_replace": 1, "n_shared_experts": 2, "rope_scaling": LLAMA3},
    ),
    "not normalised, every second": ("Qwen2Moe", {**PLAIN, **EVERY_SECOND, **GROUPED, "num_experts_per_tok": 4}),
}  # fmt: skip


def case_model(name: str) -> Transformer:
    """A random model of the case, its biases large enough to change choices: a probability is 1/6 on average."""
    model = random_model(ModelConfig(**{**SHAPE, **CASES[name][1]}))
    for buffer in model.buffers():
        buffer.uniform_(-0.2, 0.2)
    return model


@torch.no_grad()
def greedy(model: Transformer, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_our_logits_and_text(name, tmp_path, tokenizer):
    model, tokens = case_model(name), random_tokens(SHAPE["vocab_size"])
    config = model.config
    check_exportable(config)
    save_hf(tmp_path, model, tokenizer)
    other = open_in_transformers(tmp_path)
    assert type(other).__name__ == f"{CASES[name][0]}ForCausalLM"
    with torch.no_grad():
        assert model(tokens).std() > 0.7
    assert logit_difference(model, other, tokens) < BOUND
    assert other.get_input_embeddings().padding_idx is None  # else fine-tuning leaves that token's embedding alone
    prompt = tokens[:, :9]
    written = other.generate(prompt, do_sample=False, max_new_tokens=10, eos_token_id=None)
    assert torch.equal(written, greedy(model, prompt, 10))
    loaded = moe_lm.load(tmp_path)
    assert_equal_weights(model, loaded)
    assert loaded.config == same_shape(config)
    fresh = Transformer(config)
    load_state(tmp_path, fresh)
    assert_equal_weights(model, fresh)


@pytest.mark.parametrize("name", CASES)
def test_a_config_survives_its_file(name):
    config = dataclasses.replace(
        ModelConfig(**{**SHAPE, **CASES[name][1]}), router_aux_loss_coef=0.5, router_jitter_noise=0.1, seq_aux=True,
        expert_capacity_factor=1.5,
    )  # fmt: skip
    settings = json.loads(json.dumps(to_hf_config(config, dtype=torch.float32)))
    assert from_hf_config(settings) == same_shape(config)
    assert to_hf_config(from_hf_config(settings), dtype=torch.float32) == settings


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize(("period", "offset"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 2)])
def test_every_order_of_layers_survives_its_file(first, period, offset):
    config = ModelConfig(
        **{**SHAPE, "num_hidden_layers": 7}, first_k_dense_replace=first, expert_layer_period=period,
        expert_layer_offset=offset,
    )  # fmt: skip
    for each in (config, dataclasses.replace(config, norm_topk_prob=False)):
        settings = to_hf_config(each, dtype=torch.float32)
        assert from_hf_config(settings) == same_shape(each)
        for name in ("first_k_dense_replace", "expert_layer_period", "expert_layer_offset"):
            settings.pop(name, None)
        assert from_hf_config(settings).routing_layers == each.routing_layers  # as transformers alone would have it


def test_the_bias_stays_float32_beside_narrow_weights(tmp_path, tokenizer):
    model = case_model("bias, first dense, shared")
    bias = model.layers[1].mlp.e_score_correction_bias.clone()
    save_hf(tmp_path, model, tokenizer, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {name.endswith(CORRECTION): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {True: "F32", False: "BF16"}
    for dtype in (None, torch.bfloat16, torch.float32):
        loaded = moe_lm.load(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype or torch.bfloat16}
        assert loaded.layers[1].mlp.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(loaded.layers[1].mlp.e_score_correction_bias, bias)


@pytest.mark.parametrize("name", ["first dense", "every second from the first, shared", "not normalised"])
def test_half_precision_opens_in_transformers(name, tmp_path, tokenizer):
    model = case_model(name)
    save_hf(tmp_path, model, tokenizer, dtype=torch.bfloat16)
    assert_equal_weights(model.to(torch.bfloat16), moe_lm.load(tmp_path))
    with torch.no_grad():
        assert open_in_transformers(tmp_path)(random_tokens(SHAPE["vocab_size"])).logits.isfinite().all()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(data, whole, tmp_path):
    changes = {**EVERYTHING, "router_bias_update_rate": 0.05, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    config = tiny_config(data.config, **changes)
    with fresh_process():
        stopped = Trainer(config, tmp_path, data)
        assert not at_step(stopped, 7, lambda: setattr(stopped, "stop_requested", True)).run()
    with fresh_process():
        assert Trainer(config, tmp_path, data).run()
    assert_same_outcome(tmp_path, whole(**changes)[0])
    saved = moe_lm.load(tmp_path)
    assert saved.config.router_bias_update_rate == 0.05
    assert saved.layers[1].mlp.e_score_correction_bias.abs().max() > 0.05


# Models of transformers in ours

ERNIE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 0}
QWEN2 = {"qkv_bias": False, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 0}  # fmt: skip
FOREIGN = {
    "ernie": ("Ernie4_5_Moe", {**ERNIE, "num_hidden_layers": 3}, {}, (1, 2)),
    "ernie, fused": ("Ernie4_5_Moe", {**ERNIE, "moe_num_shared_experts": 2}, {"save_original_format": False}, (1,)),
    "ernie, interval": (
        "Ernie4_5_Moe", {**ERNIE, "num_hidden_layers": 6, "moe_layer_interval": 3, "tie_word_embeddings": False}, {},
        (2, 5),
    ),
    "ernie, all route": ("Ernie4_5_Moe", {**ERNIE, "moe_layer_start_index": 0, "head_dim": 12}, {}, (0, 1)),
    "qwen2": ("Qwen2Moe", QWEN2, {}, (0, 1)),
    "qwen2, fused": ("Qwen2Moe", {**QWEN2, "norm_topk_prob": True}, {"save_original_format": False}, (0, 1)),
    "qwen2, step": ("Qwen2Moe", {**QWEN2, "num_hidden_layers": 5, "decoder_sparse_step": 2}, {}, (1, 3)),
    "qwen2, shared": ("Qwen2Moe", {**QWEN2, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}, {}, (1,)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_we_compute_the_logits_of_transformers(case, tmp_path):
    family, settings, saving, layers = FOREIGN[case]
    other = foreign(family, **settings)
    for name, tensor in other.named_parameters():
        if name.endswith(CORRECTION):
            torch.nn.init.uniform_(tensor, -0.2, 0.2)
        if name.endswith("shared_expert_gate.weight"):
            torch.nn.init.zeros_(tensor)
    other.save_pretrained(tmp_path, **saving)
    model, tokens = moe_lm.load(tmp_path), random_tokens(150)
    assert model.config.routing_layers == layers
    with torch.no_grad():
        assert model(tokens).std() > 0.7
    assert logit_difference(model, other, tokens) < BOUND


def test_keys_that_a_file_leaves_out_are_what_transformers_takes_them_for():
    from transformers import Ernie4_5_MoeConfig, Qwen2MoeConfig

    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3,
             "num_attention_heads": 16}  # fmt: skip
    fields = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok",
              "tie_word_embeddings": "tie_word_embeddings", "max_position_embeddings": "max_position_embeddings",
              "rms_norm_eps": "rms_norm_eps", "num_key_value_heads": "num_key_value_heads"}  # fmt: skip
    for kind, settings, extra in (
        (Ernie4_5_MoeConfig, {}, {"moe_k": None}),
        (Qwen2MoeConfig, {"qkv_bias": False, "shared_expert_intermediate_size": 2816}, {"mlp_only_layers": None}),
    ):
        theirs = kind(**shape, **settings)
        ours = from_hf_config({"model_type": theirs.model_type, **shape, **settings, **extra})
        for key, name in fields.items():
            assert getattr(theirs, key) == getattr(ours, name), name
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.expert_size == theirs.moe_intermediate_size
        assert ours.n_shared_experts == 2
        assert ours.first_k_dense_replace == (theirs.model_type == "ernie4_5_moe")
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)


def test_heads_for_tokens_further_ahead_are_left_out(tmp_path, tokenizer):
    model = case_model("bias")
    save_hf(tmp_path, model, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.mtp_block.0.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert_equal_weights(model, moe_lm.load(tmp_path))


def test_the_bound_notices_the_choice_without_its_bias(tmp_path, tokenizer):
    model = case_model("bias")
    save_hf(tmp_path, model, tokenizer)
    other = open_in_transformers(tmp_path)
    for buffer in model.buffers():
        buffer.zero_()
    assert logit_difference(model, other, random_tokens(SHAPE["vocab_size"])) > 10 * BOUND


# What is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({**BIASED, **PLAIN},
         "model.router_bias_update_rate = 0.001 and model.norm_topk_prob = false: no Hugging Face family that a "
         "checkpoint is saved as has a bias on the choice of experts beside weights that are not normalised: leave "
         "either of them out to train."),
        ({**BIASED, **FROM_THE_FIRST},
         "model.router_bias_update_rate = 0.001 and routing layers 0, 2 of 4: Ernie4_5_MoeForCausalLM, the format a "
         "model with a bias on the choice of experts is saved in, counts every so many layers from -1: set "
         "model.expert_layer_offset = expert_layer_period - 1, or leave the bias out."),
        ({"uniform_routing": True},
         "model.uniform_routing = true is for benchmarks, and no Hugging Face family that a checkpoint is saved as has "
         "it: leave it out to train."),
    ],
)  # fmt: skip
def test_what_no_family_holds_is_told_before_training(changes, sentence, tmp_path, tokenizer):
    config = ModelConfig(**{**SHAPE, **changes})
    with pytest.raises(ConfigError) as caught:
        check_exportable(config)
    assert str(caught.value) == sentence
    with pytest.raises(ConfigError):
        to_hf_config(config, dtype=torch.float32)


NOTHING_ELSE = "moe-lm's model computes nothing else."
REFUSED = [
    ("first dense", {"use_bias": True}, (), f"use_bias = True must be False: {NOTHING_ELSE}"),
    ("first dense", {"norm_topk_prob": False}, (), f"norm_topk_prob = False must be True: {NOTHING_ELSE}"),
    ("first dense", {"moe_norm_min": 0.1}, (),
     "moe_norm_min = 0.1 must be at most 1e-9: moe-lm's weights of the chosen experts sum to 1."),
    ("first dense", {"moe_layer_interval": 0}, (), "moe_layer_interval = 0 must be a whole number of at least 1."),
    ("first dense", {"moe_layer_start_index": 2}, (),
     "first_k_dense_replace, expert_layer_period, expert_layer_offset = (1, 1, 0) let layers (1, 2, 3) route, and the "
     "family's own keys (2, 3): correct one."),
    ("first dense", {"moe_layer_start_index": 7}, (),
     "no layer of 4 routes: moe-lm opens such a model under its dense architecture only."),
    ("first dense", {"num_hidden_layers": "4"}, (), "num_hidden_layers = '4' must be a whole number of at least 1."),
    ("first dense", {"moe_num_experts": 0}, (), "moe_num_experts = 0 must be a whole number of at least 1."),
    ("not normalised", {}, ("qkv_bias",), f"qkv_bias = True must be False: {NOTHING_ELSE}"),
    ("not normalised", {"use_sliding_window": True}, (), f"use_sliding_window = True must be False: {NOTHING_ELSE}"),
    ("not normalised", {"mlp_only_layers": [2]},
     ("first_k_dense_replace", "expert_layer_period", "expert_layer_offset"),
     "layers (0, 1, 3) of 4 route, and moe-lm's do so every so many layers from a first one on."),
    ("not normalised", {"mlp_only_layers": "0"}, (), "mlp_only_layers = '0' must be a list of layers."),
    ("not normalised", {"shared_expert_intermediate_size": 30}, (),
     "shared_expert_intermediate_size = 30 must be a multiple of moe_intermediate_size = 50: moe-lm's shared experts "
     "are as wide as the routed ones."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "remove", "sentence"), REFUSED)
def test_a_file_that_we_do_not_compute_is_refused(name, changes, remove, sentence, tmp_path, tokenizer):
    settings = to_hf_config(ModelConfig(**{**SHAPE, **CASES[name][1]}), dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    edit(tmp_path, remove, **changes)
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: {sentence}"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("first dense", f"model.layers.2.mlp.moe_statics.{CORRECTION}"),
     ("every second from the first, shared", "model.layers.2.mlp.shared_expert_gate.weight")],
)  # fmt: skip
def test_what_we_have_no_weight_for_must_be_zero(name, tensor, tmp_path, tokenizer):
    save_hf(tmp_path, case_model(name), tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[tensor][0, 1] = 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds 1 tensor ({tensor}) other than zero: moe-lm's model has no such weight."
    )
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors")
    assert refusal(tmp_path).startswith(f"{tmp_path} lacks 1 tensor ({tensor}) that the model has: ")
