"""A mixture against a dense model: who is charged for what, who sees what, and what is said of the outcome."""

import dataclasses
import itertools
import json
import re
import shlex
import types
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config, weights_of

from moe_lm.bench import arms, moe_vs_dense
from moe_lm.bench.__main__ import main as bench
from moe_lm.bench.arms import Arm, Contender, Results, train_round, with_seed
from moe_lm.config import ConfigError
from moe_lm.toml import to_toml
from moe_lm.train import NotFinite, Trainer
from moe_lm.train.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("one_process", "one_thread")
ROOT = Path(__file__).resolve().parents[1]


def silent(line):
    pass


# The turns, on a clock that only steps and evaluations move


class FakeTrainer:
    """Steps of as many seconds as `pace` says at the time, and a note of every one."""

    def __init__(self, config, run_dir, data):
        self.config, self.step, self.tokens, self.data = config, 0, 0, data
        self.device, self.model = torch.device("cpu"), None
        FakeTrainer.clock.now += 100  # preparation

    @property
    def finished(self):
        return self.step >= self.config.train.steps

    def train_step(self, done=None):
        clock = FakeTrainer.clock
        experts = self.config.model.num_local_experts
        clock.now += FakeTrainer.pace[experts] * (3 if clock.slow(clock.now) else 1)
        self.step, self.tokens = self.step + 1, self.tokens + 10
        FakeTrainer.log.append((experts, done, clock.now))
        return {"loss": 1.0}


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, slow=lambda now: False)
    monkeypatch.setattr(FakeTrainer, "clock", clock, raising=False)
    monkeypatch.setattr(FakeTrainer, "log", [], raising=False)
    monkeypatch.setattr(FakeTrainer, "pace", {4: 0.7, 0: 0.5}, raising=False)
    monkeypatch.setattr(arms, "Trainer", FakeTrainer)
    monkeypatch.setattr(arms, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def evaluate(*_):
        clock.now += 1000
        return Evaluation(1.0, {"text": 1.0}, [])

    monkeypatch.setattr(arms, "evaluate", evaluate)
    return clock


def pair(config, seconds=None):
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, num_local_experts=0))
    return [Arm("mixture", config, seconds), Arm("dense", dense, seconds)]


def test_each_has_the_time_it_was_given_and_pays_for_its_steps_only(data, clock):
    mixture, dense = train_round(pair(tiny_config(data.config, steps=3), 60.0), data, Results(None), 5.0, silent)
    assert mixture["seconds"] == pytest.approx(60, abs=0.35)
    assert dense["seconds"] == pytest.approx(60, abs=0.25)
    assert (mixture["steps"], dense["steps"]) == (86, 120)
    assert mixture["tokens_per_s"] == pytest.approx(10 / 0.7)
    assert dense["budget"] == "60 s"


def test_a_slow_phase_of_the_machine_meets_both(data, clock):
    """Four seconds in ten at a third of the speed, while both train: one after the other, one alone might meet it."""
    start = 400.0
    clock.slow = lambda now: start < now < start + 60
    mixture, dense = train_round(pair(tiny_config(data.config), 60.0), data, Results(None), 5.0, silent)
    lost = [1 - record["steps"] / steps for record, steps in ((mixture, 86), (dense, 120))]
    assert min(lost) > 0.25
    assert abs(lost[0] - lost[1]) < 0.08
    turns = [experts for experts, _ in itertools.groupby(FakeTrainer.log[2:], key=lambda line: line[0])]
    assert turns[:5] == [4, 0, 4, 0, 4]


def test_the_schedule_follows_the_time_that_is_spent(data, clock):
    train_round(pair(tiny_config(data.config), 60.0), data, Results(None), 5.0, silent)
    for experts, pace in FakeTrainer.pace.items():
        done = [share for each, share, _ in FakeTrainer.log if each == experts][1:]  # the first one only warms up
        assert done[0] == 0.0
        assert done[1:] == pytest.approx([min(1, pace * step / 60) for step in range(2, len(done) + 1)])
        assert done[-1] > 0.99


def test_steps_are_counted_where_there_is_no_time(data, clock):
    train_round(pair(tiny_config(data.config, steps=7)), data, Results(None), 1.0, silent)
    assert [share for _, share, _ in FakeTrainer.log] == [None] * len(FakeTrainer.log)
    assert [sum(experts == each for experts, *_ in FakeTrainer.log[2:]) for each in (4, 0)] == [7, 7]


# What they learn


def test_equal_tokens_are_the_same_training_whatever_the_turns(data, tmp_path):
    """Another contender draws random numbers in between: the router's noise must not notice."""
    config = tiny_config(data.config, steps=6, router_jitter_noise=0.3)
    alone = Trainer(config, tmp_path, data)
    for _ in range(6):
        alone.train_step()
    contenders = [Contender(arm, data, tmp_path) for arm in pair(config)]
    while not all(each.finished for each in contenders):
        for each in contenders:
            each.take_turn(0.0)
            torch.rand(7)
    for name, weight in weights_of(alone.model).items():
        assert torch.equal(weight, contenders[0].trainer.model.state_dict()[name]), name
    first, second = (each.trainer.loader.state_dict() for each in contenders)
    assert first == second
    record = contenders[0].record()
    assert (record["steps"], record["tokens"], record["failure"]) == (6, 6 * 256, None)
    assert record["bits_per_byte"] == pytest.approx(alone.evaluate()["val_bits_per_byte"], rel=1e-12)


def test_one_that_diverges_is_given_up_and_the_others_go_on(data, monkeypatch):
    take = Trainer.train_step

    def train_step(self, done=None):
        if self.config.model.is_moe and self.step == 2:
            raise NotFinite("step 3: loss = nan")
        return take(self, done)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    lines = []
    arms_ = pair(tiny_config(data.config, steps=4))
    mixture, dense = train_round(arms_, data, Results(None), 0.0, lines.append)
    assert mixture["failure"] == "step 3: loss = nan"
    assert mixture["bits_per_byte"] is None
    assert dense["steps"] == 4
    assert "mixture, seed 0: given up: step 3: loss = nan" in lines
    assert "nothing to compare" in moe_vs_dense.verdict("mixture", "dense", [mixture], [dense])
    assert "given up" in "\n".join(moe_vs_dense.table({"mixture": [mixture], "dense": [dense]}))


# The file of results


def test_what_is_on_file_is_not_trained_again(data, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "results.jsonl"
    both = pair(tiny_config(data.config, steps=2))
    records = train_round(both, data, Results(path), 1.0, silent)
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    monkeypatch.setattr(arms, "Trainer", None)
    assert train_round(both, data, Results(path), 1.0, silent) == records
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == records


@pytest.mark.parametrize(("text", "said"), [('{"step": 1}\n', "something else"), ("[1]\n", "something else")])
def test_other_files_are_refused(tmp_path, text, said):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Results(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == text
    with pytest.raises(ConfigError, match="cannot be read and written"):
        Results(tmp_path)


def test_the_key_is_that_of_what_changes_the_training(data):
    config = tiny_config(data.config)
    key = Arm("a", config).key
    assert Arm("b", tiny_config(data.config, eval_every=3, every=2)).key == key
    others = [
        Arm("a", with_seed(config, 1)), Arm("a", with_seed(config, 0, steps=21)), Arm("a", config, 60.0),
        Arm("a", with_seed(config, 0, learning_rate=0.5)), Arm("a", tiny_config(data.config, hidden_size=64)),
        Arm("a", tiny_config(data.config, eval_tokens=512)),
    ]  # fmt: skip
    assert len({key, *(arm.key for arm in others)}) == 7
    assert Arm("a", with_seed(config, 0, steps=21), 60.0).key == Arm("a", config, 60.0).key


# What is said


def records(*bits, speed=100.0, name="m"):
    return [
        {"name": name, "bits_per_byte": value, "by_source": {"python:code": value}, "tokens_per_s": speed,
         "parameters": 5e6, "active": 3e6, "tokens": 1e6}
        for value in bits
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (
            (1.50, 1.51), (1.53, 1.54),
            "0.0300 bits per byte lower than d (by seed -0.0300, -0.0300), more than the spread of 0.0100: the mixture "
            "wins",
        ),
        (
            (1.50, 1.56), (1.53, 1.57),
            "lower than d (by seed -0.0300, -0.0100), against a spread of 0.0600: neither wins",
        ),
        (
            (1.50, 1.51), (1.47, 1.47),
            "higher than d (by seed +0.0300, +0.0400), more than the spread of 0.0100: the dense model wins",
        ),
        ((1.50,), (1.47,), "0.0300 bits per byte higher than d; one seed says nothing of the spread"),
    ],
)  # fmt: skip
def test_the_verdict_weighs_the_difference_against_the_spread(ours, theirs, said):
    sentence = moe_vs_dense.verdict("m", "d", records(*ours, speed=90.0), records(*theirs))
    assert sentence.startswith("m is ")
    assert said in sentence
    assert sentence.endswith("It trains at 0.90x the tokens per second.")


@pytest.fixture
def files(data, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    config = tiny_config(data.config, steps=6)
    dense = tiny_config(data.config, steps=6, num_local_experts=0, intermediate_size=96)
    for name, each in (("mix", config), ("dense", dense)):
        (tmp_path / f"{name}.toml").write_text(to_toml(each), "utf-8")
    return tmp_path


def test_the_whole_comparison(files, capsys, monkeypatch):
    words = [
        "moe-vs-dense", *(str(files / f"{name}.toml") for name in ("mix", "dense")), "--minutes", "0.002", "--seeds",
        "2", "--rates", "1,3", "--turn", "0.05", "--sweep", "--json", str(files / "r.jsonl"),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench"])
    monkeypatch.setattr(moe_vs_dense, "EXPERTS", (2, 4, 8))
    monkeypatch.setattr("runpy.run_module", lambda name, **_: moe_vs_dense.main(__import__("sys").argv[1:]))
    bench(words)
    first = capsys.readouterr()
    budgets = first.out.split("\n\n")[1:]
    titles = ("equal tokens, 6 steps", "equal wall-clock, 0.002 minutes each")
    for text, title, trial in zip(budgets, titles, ("after 2 steps", "after 0.04 s"), strict=True):
        assert text.splitlines()[0].endswith(trial)
        lines = text[text.index(title) :].splitlines()
        assert [line.split("  ")[0].strip() for line in lines[2:6]] == ["dense", "2 experts", "mix", "8 experts"]
        assert "mix is 0." in text
    assert "the best of mix, x3, is the greatest tried" in budgets[0]
    assert "mix, seed 1: step 6 of 6 steps" in first.err
    kept = [json.loads(line) for line in (files / "r.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 2 * (4 + 2 * 4)
    assert {line["learning_rate"] for line in kept[4:12]} == {0.03}
    assert {line["budget"] for line in kept[12:16]} == {"0.04 s"}
    monkeypatch.setattr(arms, "Trainer", None)
    bench(words)
    assert capsys.readouterr().out.split("mix: ", 1)[1] == first.out.split("mix: ", 1)[1]


COMMANDS = re.findall(
    r"^python -m moe_lm\.bench moe-vs-dense (.*)$", (ROOT / "docs" / "training.md").read_text("utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_the_documented_comparisons_are_read_as_meant(command, tmp_path, monkeypatch):
    """They take an hour to run; here they come to the point where the data are prepared."""
    monkeypatch.setattr(moe_vs_dense, "prepare_data", lambda *args, **options: None)
    began = []
    monkeypatch.setattr(moe_vs_dense.Comparison, "run", lambda self: began.append(self.args))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    moe_vs_dense.main(shlex.split(command))
    assert began[0].minutes == 10


def test_a_setting_is_one_of_both(files, data, monkeypatch):
    compared = []
    monkeypatch.setattr(moe_vs_dense.Comparison, "run", lambda self: compared.extend(self.configs.values()))
    monkeypatch.chdir(files)
    moe_vs_dense.main(["mix.toml", "dense.toml", "--train.batch_tokens", "96", "--train.seed", "3"])
    assert [(config.train.batch_tokens, config.train.seed) for config in compared] == [(96, 3)] * 2
    assert [config.model.num_local_experts for config in compared] == [4, 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mix.toml", "dense.toml", "--train.seeds", "1"], "--train.seeds is not a known setting"),
        (["dense.toml", "mix.toml"], "dense.toml has no experts: name the mixture first"),
        (["mix.toml", "mix.toml"], "num_local_experts = 4: name a dense config second"),
        (["mix.toml", "other.toml"], "train.seed of .* differ, 0 and 5: make them alike"),
        (["mix.toml", "dense.toml", "--minutes", "0"], "--minutes 0.0 must be greater than 0"),
        (["mix.toml", "dense.toml", "--seeds", "0"], "--seeds 0 must be greater than 0"),
        (["mix.toml", "dense.toml", "--rates", "1,x"], "--rates 1,x must be different positive numbers"),
        (["mix.toml", "dense.toml", "--rates", "1,1"], "--rates 1,1 must be"),
        (["mix.toml", "dense.toml", "--rates", "nan"], "--rates nan must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(files, data, monkeypatch, words, said):
    (files / "other.toml").write_text(to_toml(tiny_config(data.config, num_local_experts=0, seed=5)), "utf-8")
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError, match=said):
        moe_vs_dense.main(words)
