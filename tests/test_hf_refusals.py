"""Hugging Face directories that are refused, found, or left out a key: with one sentence, or the right default."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hub_models import (
    CONFIGS,
    SMALL,
    assert_equal_weights,
    edit,
    refusal,
    same_shape,
)
from safetensors.torch import load_file, save_file

import moe_lm
from moe_lm.checkpoint import (
    check_exportable,
    from_hf_config,
    resolve_model_dir,
    to_hf_config,
)
from moe_lm.config import ConfigError

pytestmark = pytest.mark.usefixtures("offline", "one_thread")


# What is refused


ROPE = "rope_scaling"
REFUSED = [
    ("mixture", {"sliding_window": 32},
     "sliding_window = 32 must be null or at least max_position_embeddings = 64: moe-lm attends to the whole context."),
    ("mixture", {"architectures": ["Qwen2ForCausalLM"]},
     "architecture 'Qwen2ForCausalLM' is not one that moe-lm opens: MixtralForCausalLM, MistralForCausalLM, "
     "LlamaForCausalLM, GraniteMoeSharedForCausalLM, Ernie4_5_MoeForCausalLM, Qwen2MoeForCausalLM."),
    ("mixture", {"architectures": None, "model_type": "gpt2"},
     "architecture 'gpt2' is not one that moe-lm opens: MixtralForCausalLM, MistralForCausalLM, LlamaForCausalLM, "
     "GraniteMoeSharedForCausalLM, Ernie4_5_MoeForCausalLM, Qwen2MoeForCausalLM."),
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
