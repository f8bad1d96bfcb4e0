"""The sweep: every combination once, the best of every model, and a word where the best lies at an edge."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from tiny_run import tiny_config

from moe_lm.bench import arms, sweep
from moe_lm.bench.sweep import Axis, best_choices, edges, parse_axis, table
from moe_lm.cli import parse_run_config
from moe_lm.config import ConfigError
from moe_lm.toml import to_toml

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("one_process", "one_thread")


@pytest.fixture
def config_file(data, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(tiny_config(data.config, steps=4)), "utf-8")
    return path


def test_axes():
    assert parse_axis("train.learning-rate=1e-3,2e-3") == Axis(("train.learning_rate",), (("1e-3",), ("2e-3",)))
    linked = parse_axis("model.hidden_size+model.num_attention_heads=32+2,64+4")
    assert linked == Axis(("model.hidden_size", "model.num_attention_heads"), (("32", "2"), ("64", "4")))
    assert linked.is_shape
    assert parse_axis("model.hidden_size+train.learning_rate=32+1,64+2").is_shape
    assert not parse_axis("model.initializer_range=0.02,0.04").is_shape
    assert parse_axis("train.learning_rate=1e+3,2e+3").values == (("1e+3",), ("2e+3",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is nothing to sweep"),
        (["--over", "train.learning_rate"], "must be KEY=VALUE,VALUE"),
        (["--over", "train.learning_rate="], "must be KEY=VALUE,VALUE"),
        (["--over", "train.weight_decay+train.warmup=1,2"], "'1' is not one value for each"),
        (["--over", "train.learning_rate=1,1"], "names a value twice"),
        (["--over", "train.warmup=0.1", "--over", "train.warmup=0.2"], "train.warmup twice"),
        (["--over", "train.seed=1,2"], "train.seed is not swept: choose with --seeds"),
        (["--over", "train.steps=1,2"], "train.steps is not swept: choose with --steps"),
        (["--over", "train.warmup=0.1,2"], "train.warmup = 2.0 must be a share"),
        (["--over", "train.learning_rat=1"], "did you mean --train.learning_rate"),
        (["--over", "train.warmup=0.1", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--over", "train.warmup=0.1", "--minutes", "0"], "--minutes 0.0 must be"),
        (["--over", "train.warmup=0.1", "--steps", "-3"], "--steps -3 must be"),
        (["--over", "train.warmup=0.1", "--steps", "3", "--minutes", "1"], "exclude each other"),
    ],
)
def test_refusals(config_file, words, said):
    with pytest.raises(ConfigError, match=said):
        sweep.main([str(config_file), *words])


def test_every_combination_is_trained_once_and_kept(config_file, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "sweep.jsonl"
    words = [
        str(config_file), "--train.weight_decay", "0.5", "--over", "train.learning_rate=1e-3,1e-2", "--over",
        "model.hidden_size+model.num_attention_heads=16+2,32+4", "--seeds", "2", "--steps", "3", "--json", str(kept),
    ]  # fmt: skip
    sweep.main(words)
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert [(line["name"], line["seed"], line["steps"]) for line in lines] == [
        (f"learning_rate {rate}, hidden_size {width}, num_attention_heads {heads}", seed, 3)
        for rate in ("1e-3", "1e-2") for width, heads in ((16, 2), (32, 4)) for seed in (0, 1)
    ]  # fmt: skip
    assert len({line["parameters"] for line in lines}) == 2
    assert out.count("<- best") == 2, "one for each width"
    assert "the best train.learning_rate, 1e-2, is the greatest tried: try higher ones before trusting it." in out
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]), "utf-8")
    trained, contender = [], arms.Contender
    monkeypatch.setattr(arms, "Contender", lambda arm, *rest: trained.append(arm.name) or contender(arm, *rest))
    sweep.main(words)
    assert set(trained) == {lines[-1]["name"]}
    strip = [line.rpartition("  ")[0] for line in out.splitlines()]  # the speed of what was trained again
    assert [line.rpartition("  ")[0] for line in capsys.readouterr().out.splitlines()][:4] == strip[:4]


def found(**bits):
    return {
        tuple(key.split("_")): [{"bits_per_byte": value, "by_source": {"a:code": value}, "tokens_per_s": 1.0}]
        for key, value in bits.items()
    }  # fmt: skip


def test_the_best_is_that_of_every_model_and_never_one_that_was_given_up():
    axes = [Axis(("model.num_local_experts",), (("2",), ("4",))), Axis(("train.warmup",), (("1",), ("5",), ("9",)))]
    results = found(**{"2_1": 3.0, "2_5": 2.0, "2_9": None, "4_1": 1.0, "4_5": 1.5, "4_9": 1.1})
    assert best_choices(axes, results) == [("2", "5"), ("4", "1")]
    assert edges(axes, ("2", "5")) == []
    assert edges(axes, ("4", "1")) == [
        "the best train.warmup, 1, is the least tried: try lower ones before trusting it."
    ]
    lines = table(axes, results)
    assert [line.endswith("<- best") for line in lines] == [False, False, True, False, True, False, False]
    assert "given up" in lines[3]


@pytest.mark.parametrize(("values", "best"), [(("0.1",), "0.1"), (("cosine", "linear"), "linear")])
def test_what_has_no_edge_is_not_warned_of(values, best):
    assert edges([Axis(("train.x",), tuple((value,) for value in values))], (best,)) == []


def test_numbers_are_ordered_by_size_and_not_as_text():
    axis = Axis(("train.x",), (("9e-3",), ("1e-2",), ("0.02",)))
    assert edges([axis], ("1e-2",)) == []
    assert "greatest" in edges([axis], ("0.02",))[0]


DOCUMENT = (ROOT / "docs" / "training.md").read_text("utf-8")
COMMANDS = re.findall(r"^python -m moe_lm\.bench sweep (.*)$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_the_documented_sweeps_are_read_as_meant(command):
    """They take minutes to run; here every combination of theirs is built, and each trains another model or rate."""
    words = [str(ROOT / word) if word.endswith(".toml") else word for word in shlex.split(command)]
    _, args = parse_run_config(words, None, extra=sweep.add_options)
    axes = [parse_axis(text) for text in args.over]
    sweep.check_arguments(args, axes)
    configs = sweep.combinations(words, axes)
    assert len({arms.Arm("", config).key for config in configs.values()}) == math.prod(len(a.values) for a in axes)
    for config in configs.values():
        assert config.model.head_dim * config.model.num_attention_heads == config.model.hidden_size
