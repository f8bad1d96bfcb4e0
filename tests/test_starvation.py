"""Experts that starve are named once, wherever the run is stopped and however seldom it is logged."""

import dataclasses
import io
import json
import random

import pytest
from tiny_run import Terminal, assert_same_outcome, at_step, fresh_process, tiny_config

from moe_lm.config import ConfigError, TrainConfig
from moe_lm.train import Trainer, metrics
from moe_lm.train.metrics import read_metrics
from moe_lm.train.starvation import STARVING_SHARE, Starvation, StarvationWatch, named_in

LOW = STARVING_SHARE / 4
"""Of four experts, the share at which one starves no longer."""


def loads(share: float) -> list[list[float]]:
    """Two layers of four experts, the last one of the second with this share."""
    return [[0.25] * 4, [(1 - share) / 3] * 3 + [share]]


def named(watch: StarvationWatch, shares: list[float], first: int = 1) -> list[Starvation]:
    return [row for step, share in enumerate(shares, first) for row in watch.update(step, loads(share))]


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ([0.0] * 3, [(1, 3)]),
        ([0.0] * 9, [(1, 3)]),  # once, however long it lasts
        ([0.0, 0.0, 0.3, 0.0, 0.0], []),
        ([0.0] * 4 + [0.2] + [0.01] * 3, [(1, 3), (6, 8)]),  # fed once, it may starve again
        ([LOW] * 5, []),
        ([LOW * 0.999] * 5, [(1, 3)]),
        ([0.1, 0.0, 0.012, 0.0], [(2, 4)]),
    ],
)
def test_an_expert_is_named_once_it_has_starved_for_so_many_steps(shares, steps):
    assert named(StarvationWatch(3), shares) == [Starvation(1, 3, *span) for span in steps]


def test_it_counts_as_a_loop_over_every_expert_does():
    draw = random.Random(0)
    history = [[[draw.choice([0.0, 0.0, 0.0, 0.5]) for _ in range(5)] for _ in range(3)] for _ in range(200)]
    expected = []
    for step in range(1, 201):
        for layer in range(3):
            for expert in range(5):
                past = [row[layer][expert] for row in history[:step]]
                if step >= 4 and not any(past[-4:]) and (step == 4 or past[-5]):
                    expected.append(Starvation(layer, expert, step - 3, step))
    watch = StarvationWatch(4)
    found = [row for step, load in enumerate(history, 1) for row in watch.update(step, load)]
    assert sorted(found) == sorted(expected)
    assert len(found) > 50


def test_nothing_is_named_of_a_dense_model_or_when_turned_off():
    assert StarvationWatch(1).update(1, []) == []
    assert named(StarvationWatch(0), [0.0] * 9) == []
    with pytest.raises(ConfigError, match=r"train.starving_steps = -1 must be 0 or more\."):
        TrainConfig(starving_steps=-1)


@pytest.mark.parametrize("cut", range(9))
def test_a_resumed_watch_is_the_one_that_went_on(cut):
    shares = [0.0] * 4 + [0.2] + [0.0] * 4
    whole, first, second = StarvationWatch(3), StarvationWatch(3), StarvationWatch(3)
    before = named(first, shares[:cut])
    second.load_state(json.loads(json.dumps(first.state())))
    assert before + named(second, shares[cut:], cut + 1) == named(whole, shares)
    assert second.log() == whole.log()
    assert second.state() == whole.state()


@pytest.mark.parametrize(("before", "after", "steps"), [(5, 2, [(1, 5)]), (3, 2, []), (3, 6, []), (0, 2, [(5, 6)]),
                                                        (3, 0, []), (6, 5, [(1, 5)])])  # fmt: skip
def test_a_limit_changed_at_a_resume_names_nobody_twice(before, after, steps):
    old, new = StarvationWatch(before), StarvationWatch(after)
    named(old, [0.0] * 4)
    new.load_state(old.state())
    found = [(row.since, row.step) for row in named(new, [0.0] * 9, 5)]
    assert [step for _, step in found] == [step for _, step in steps]


def test_a_line_names_those_since_the_last_line():
    watch = StarvationWatch(3)
    named(watch, [0.0] * 7)
    line = watch.log()
    assert line == {"starved": [[1, 3, 1, 3]]}
    assert watch.log() == {}
    assert named_in([{"step": 1}, line, {}]) == [Starvation(1, 3, 1, 3)]
    assert str(Starvation(1, 3, 76, 100)) == (
        "layer 1, expert 3 starves: less than 5% of its even share in each of the steps 76 to 100"
    )


def starve(trainer: Trainer) -> Trainer:
    """Have the trainer find an even load, but for one expert that gets nothing from step 5 on."""
    read = trainer.read_step

    def read_step(step):
        even = [0.25] * 4
        return read(step) | {"expert_load": [even, [0.4, 0.3, 0.0, 0.3] if step.number >= 5 else even]}

    trainer.read_step = read_step
    return trainer


SETTINGS = {"starving_steps": 4, "log_every": 5}


def run(run_dir, data, settings=SETTINGS, stop: int | None = None, **changes) -> bool:
    with fresh_process():
        config = tiny_config(data.config, every=7, **settings, **changes)
        trainer = starve(Trainer(config, run_dir, data))
        if stop:
            at_step(trainer, stop, lambda: setattr(trainer, "stop_requested", True))
        return trainer.run()


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("starving")
    assert run(folder, data)
    return folder


def test_a_run_says_it_once_above_the_live_line_and_logs_it(data, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(metrics.sys, "stderr", terminal)
    assert run(tmp_path, data)
    (said,) = [line for line in terminal.getvalue().split("\n") if "starves" in line]
    assert said.endswith("\r\x1b[2Kwarning: layer 1, expert 2 starves: less than 5% of its even share in each of the "
                         "steps 5 to 8")  # fmt: skip
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert {line["step"]: line.get("starved") for line in lines} == {
        5: None, 10: [[1, 2, 5, 8]], 15: None, 20: None
    }  # fmt: skip


@pytest.mark.parametrize("stop", [6, 8, 9])
def test_a_run_stopped_while_an_expert_starves_is_the_run_that_went_on(data, whole_run, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(metrics.sys, "stderr", told := io.StringIO())
    assert not run(tmp_path, data, stop=stop)
    assert run(tmp_path, data)
    assert told.getvalue().count("starves") == 1
    assert_same_outcome(whole_run, tmp_path)


def test_a_checkpoint_of_an_older_version_resumes(data, tmp_path):
    assert not run(tmp_path, data, stop=6)
    (file,) = tmp_path.rglob("progress.json")
    progress = json.loads(file.read_text("utf-8"))
    del progress["starvation"]
    file.write_text(json.dumps(progress), "utf-8")
    assert run(tmp_path, data)
    assert [row.step for row in named_in(read_metrics(tmp_path / "metrics.jsonl"))] == [10]


def test_settings_without_it_log_nothing(data, tmp_path):
    assert run(tmp_path, data, SETTINGS | {"starving_steps": 0})
    assert not named_in(read_metrics(tmp_path / "metrics.jsonl"))
    assert dataclasses.asdict(TrainConfig())["starving_steps"] == 25
