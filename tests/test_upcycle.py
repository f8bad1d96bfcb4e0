"""Mixtures that start as a dense model: the same logits, the same loss, its tokenizer, once."""

import dataclasses
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hub_models import CONTEXT, random_model, random_tokens
from tiny_run import assert_same_outcome, at_step, fresh_process, tiny_config, write_corpus

import train
from moe_lm import load, load_tokenizer
from moe_lm.bench import machine
from moe_lm.checkpoint import load_state, save_hf
from moe_lm.cli import run_main
from moe_lm.config import ConfigError, ModelConfig, RunConfig, TrainConfig
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.toml import load_config, to_toml
from moe_lm.train import Trainer
from moe_lm.train.evaluate import evaluate
from moe_lm.train.metrics import read_metrics
from moe_lm.train.run import open_run
from moe_lm.train.upcycle import check_upcycling, upcycle

pytestmark = pytest.mark.usefixtures("one_thread", "one_process")

ROOT = Path(train.__file__).resolve().parent
CONFIGS, DOCUMENT = ROOT / "configs", ROOT / "docs" / "checkpoints.md"
SHAPE = {
    "vocab_size": 273, "hidden_size": 36, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 14, "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
    "rope_theta": 500.0,
}  # fmt: skip
MIXTURES = {
    "copies": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "copies, top-1": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "halves": {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 30},
    "thirds, two groups a token": {"num_local_experts": 15, "num_experts_per_tok": 6, "moe_intermediate_size": 20},
    "fifths, one shared": {
        "num_local_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "n_shared_experts": 1,
    },
    "fifths, three shared, first dense": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 3,
        "first_k_dense_replace": 1,
    },
    "every second": {"num_local_experts": 6, "num_experts_per_tok": 2, "expert_layer_period": 2},
    "all of them, not normalised": {"num_local_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "bias": {
        "num_local_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 30, "router_bias_update_rate": 1e-3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    """A dense model and its directory."""
    model, directory = random_model(ModelConfig(**SHAPE, num_local_experts=0)), tmp_path_factory.mktemp("dense")
    save_hf(directory, model, tokenizer)
    return model, directory


def run_config(path: Path | str, **changes) -> RunConfig:
    model = ModelConfig(**{**SHAPE, "num_local_experts": 4, **changes})
    data = dataclasses.replace(RunConfig().data, sequence_length=CONTEXT)
    return RunConfig(model=model, data=data, train=TrainConfig(upcycle=str(path)))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_logits_are_those_of_the_dense_model(name, dense):
    config = run_config(dense[1], **MIXTURES[name])
    check_upcycling(config)
    model = Transformer(config.model).reset_parameters(zero_residual=True)
    upcycle(model, dense[1])
    tokens = random_tokens(SHAPE["vocab_size"])
    with torch.no_grad():
        expected, logits = dense[0](tokens), model.eval()(tokens)
        routings = model.hidden_states(tokens, torch.arange(CONTEXT).expand(tokens.shape), whole_rows())[1]
    assert expected.std() > 0.7
    assert (logits - expected).abs().max() < 2e-5
    routed = SHAPE["intermediate_size"] // config.model.expert_size - config.model.n_shared_experts
    for layer, each in zip(config.model.routing_layers, routings, strict=True):
        assert each.logits[:, ::routed].std() > 0.1  # a fresh router, which tells tokens and groups apart
        counts = each.routing.offsets.diff().unflatten(0, (-1, routed))
        assert torch.equal(counts, counts[:, :1].expand_as(counts))
        assert (counts[:, 0] > 0).sum() > 1
        shards = model.layers[layer].mlp.experts.down_proj[:routed]
        assert len(torch.unique(shards, dim=0)) == routed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_local_experts": 0}, "needs a mixture to start: set model.num_local_experts above 0."),
        ({"hidden_size": 40, "rope_theta": 1e4},
         "has hidden_size = 36 and rope_theta = 500.0, and this run model.hidden_size = 40 and rope_theta = 10000.0: "
         "make them equal."),
        ({"vocab_size": 300}, "has vocab_size = 273, and this run model.vocab_size = 300: make them equal."),
        ({"first_k_dense_replace": 1, "intermediate_size": 64, "moe_intermediate_size": 30},
         "has intermediate_size = 60, and the dense layers of this run model.intermediate_size = 64: make them equal."),
        ({"intermediate_size": 64},
         "has MLPs of width 60, and the experts' width is 64: set model.moe_intermediate_size to 60 divided by a whole "
         "number."),
        ({"n_shared_experts": 2, "moe_intermediate_size": 30},
         "has MLPs of width 60, 2 times the experts' 30, and model.n_shared_experts = 2 leaves no shard to route: set "
         "it below 2, or narrow the experts."),
        ({"norm_topk_prob": False},
         "needs weights of the chosen experts that sum to 1, and model.norm_topk_prob = false: set it to true."),
    ],
)  # fmt: skip
def test_what_cannot_start_equal_is_refused(changes, sentence, dense):
    with pytest.raises(ConfigError) as caught:
        check_upcycling(run_config(dense[1], **changes))
    assert str(caught.value) == f"train.upcycle = {dense[1]} {sentence}"


def test_groups_that_are_not_whole_are_refused(dense):
    for changes, sentence in (
        ({"moe_intermediate_size": 20, "num_experts_per_tok": 2, "num_local_experts": 6},
         "model.num_experts_per_tok = 2 must be a multiple of 3, the routed experts that are one MLP of train.upcycle "
         f"= {dense[1]}: its width 60 is 3 times the experts' 20."),
        ({"moe_intermediate_size": 20, "n_shared_experts": 1, "num_local_experts": 5},
         "model.num_local_experts = 5 must be a multiple of 2, the routed experts that are one MLP of train.upcycle = "
         f"{dense[1]}: its width 60 is 3 times the experts' 20, of which 1 are shared."),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            check_upcycling(run_config(dense[1], **changes))
        assert str(caught.value) == sentence


def test_what_is_no_dense_model_is_refused(dense, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"^train\.upcycle: there is no directory runs/gone: name a model, a check"):
        check_upcycling(run_config("runs/gone"))
    save_hf(tmp_path, random_model(ModelConfig(**SHAPE, num_local_experts=4)), tokenizer)
    with pytest.raises(ConfigError, match=r"is a mixture of 4 experts: name a dense model\.$"):
        check_upcycling(run_config(tmp_path))
    with pytest.raises(ConfigError, match=r"^train\.upcycle = x brings its own tokenizer beside data\.tokenizer = y: "):
        RunConfig(train=TrainConfig(upcycle="x"), data=dataclasses.replace(RunConfig().data, tokenizer="y"))
    with pytest.raises(ConfigError, match=r"^draft = d\.toml has a train\.upcycle, and a draft has its target's tok"):
        open_run(tmp_path / "run", dataclasses.replace(RunConfig(), draft="d.toml"), run_config(dense[1]))
    assert not (tmp_path / "run").exists()


FINE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_local_experts": 8}
"""Experts of half the width of the tiny run's MLP."""


def test_the_first_loss_is_that_of_the_dense_run_and_a_resumed_run_does_not_start_again(data, whole, tmp_path):
    source, trained, _ = whole(num_local_experts=0)
    copy = Path(shutil.copytree(source, tmp_path / "dense"))
    config = tiny_config(data.config, upcycle=str(copy), **FINE)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    again = Trainer(tiny_config(data.config, num_local_experts=0), tmp_path / "again", data)
    load_state(source, again.model)
    loss = again.train_step()["loss"]
    first = Trainer(config, tmp_path / "one", data)
    held_out = [evaluate(model, data, config, 1024).bits_per_byte for model in (trained.model, first.model)]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-6)
    assert first.run()
    assert read_metrics(tmp_path / "one" / "metrics.jsonl")[0]["loss"] == pytest.approx(loss, abs=1e-6)
    stopped = Trainer(config, tmp_path / "two", data)
    assert not at_step(stopped, 7, lambda: setattr(stopped, "stop_requested", True)).run()
    shutil.rmtree(copy)
    with fresh_process():
        assert Trainer(config, tmp_path / "two", data).run()
    assert_same_outcome(tmp_path / "two", tmp_path / "one")


# The commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the configs that docs/checkpoints.md names, made tiny; nano on another text than nano-dense."""
    root = tmp_path_factory.mktemp("place")
    data = write_corpus(root / "corpus")
    (root / "configs").mkdir()
    widths = {"intermediate_size": load_config(CONFIGS / "nano-dense.toml").model.intermediate_size}
    dense = tiny_config(dataclasses.replace(data, sources=data.sources[:1]), steps=4, **widths, num_local_experts=0)
    mixture = {name: getattr(load_config(CONFIGS / "nano.toml").model, name) for name in (*FINE, *widths)}
    (root / "configs" / "nano-dense.toml").write_text(to_toml(dense), "utf-8")
    (root / "configs" / "nano.toml").write_text(to_toml(tiny_config(data, steps=4, **mixture)), "utf-8")
    return root


@pytest.fixture
def call(place, monkeypatch, capfd):
    """A function from the words after `python train.py` to exit status and standard error."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    monkeypatch.setattr(machine, "gemm_rate", lambda device, dtype: 1e9)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as exit_:
            run_main(train.main)
        return exit_.value.code, capfd.readouterr().err

    return run


def test_the_commands_of_the_document(call, place):
    commands = re.findall(r"^python train\.py (.*?)(?=  #|$)", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert any("--train.upcycle" in command for command in commands)
    assert any("--model." in command for command in commands)
    for command in commands:
        status, said = call(*shlex.split(command), "--draft", "none")
        assert status in (0, None), said
        assert (", upcycled from runs/nano-dense" in said) == ("--train.upcycle" in command)
    first = place / "runs" / "nano"
    assert load_config(first / "config.toml").train.upcycle == "runs/nano-dense"
    own, brought = load_tokenizer(first).to_str(), load_tokenizer(place / "runs" / "nano-dense").to_str()
    assert own == brought
    assert load(first).config.num_local_experts == 16


def test_what_cannot_start_is_one_line_and_leaves_no_run(call, place):
    for words, message in (
        (("--train.upcycle", "runs/gone"), "train.upcycle: there is no directory runs/gone: name a model, a"),
        (("--train.upcycle", "corpus"), "train.upcycle: corpus has neither a config.json nor checkpoints/"),
        (("--train.upcycle", "runs/nano-dense", "--model.hidden_size", "64"),
         "train.upcycle = runs/nano-dense has hidden_size = 32, and this run model.hidden_size = 64: make them"),
    ):  # fmt: skip
        status, said = call("configs/nano.toml", "--run-dir", "runs/y", *words)
        assert status == 2
        assert said.startswith(message)
        assert len(said.splitlines()) == 1
    assert not (place / "runs" / "y").exists()
    status, said = call("--resume", "runs/nano", "--train.upcycle", "none")
    assert status == 2
    assert said == (
        "train.upcycle = none is not the runs/nano-dense that runs/nano began with: resume without --train.upcycle.\n"
    )
