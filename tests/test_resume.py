"""Runs that nothing can knock off course: stopped, crashed or not finite, they end as if undisturbed."""

import copy
import dataclasses
import math
import os
import signal
import sys

import pytest
import torch
from tiny_run import EVERYTHING, Terminal, assert_same_outcome, at_step, fresh_process, outcome, tiny_config, weights_of

from moe_lm import load
from moe_lm.checkpoint.directory import UNFINISHED, checkpoints
from moe_lm.config import ConfigError
from moe_lm.train import NotFinite, Trainer, loop
from moe_lm.train.evaluate import Evaluation, evaluate
from moe_lm.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")

# Stops and resumes


def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("changes", "number"), [({}, signal.SIGINT), (EVERYTHING, signal.SIGTERM)], ids=["plain", "everything"]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(data, whole, tmp_path, changes, number):
    config = tiny_config(data.config, **changes)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = at_step(Trainer(config, tmp_path, data), 7, lambda: stop(number))
    assert not trainer.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert trainer.step == 7
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006", "step-000007"]
    with fresh_process():
        resumed = Trainer(config, tmp_path, data)
        assert resumed.step == 7
        assert resumed.seconds == trainer.seconds > 0
        assert resumed.run()
    assert resumed.seconds > trainer.seconds
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000018", "step-000020"]
    assert_same_outcome(tmp_path, whole(**changes)[0])


def test_the_second_signal_acts_as_ever(data, tmp_path):
    def twice():
        stop(signal.SIGINT)
        stop(signal.SIGINT)

    trainer = at_step(Trainer(tiny_config(data.config), tmp_path, data), 7, twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006"]


@pytest.mark.parametrize("step", [0, 20])
def test_a_stop_before_the_first_step_or_in_the_last_one_is_a_stop(data, whole, tmp_path, step):
    config = tiny_config(data.config)
    trainer = at_step(Trainer(config, tmp_path, data), step, stop)
    trainer.stop_requested = step == 0
    assert not trainer.run()
    assert checkpoints(tmp_path)[-1].name == f"step-{step:06d}"
    with fresh_process():
        assert Trainer(config, tmp_path, data).run()
    assert_same_outcome(tmp_path, whole()[0])


class Crash(Exception):
    """Stands for the end of the process."""


def crash():
    raise Crash


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_crashed_run_takes_its_steps_again(data, whole, tmp_path, changes):
    config = tiny_config(data.config, **changes)
    with pytest.raises(Crash):
        at_step(Trainer(config, tmp_path, data), 11, crash).run()
    assert checkpoints(tmp_path)[-1].name == "step-000006"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 10
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tok')
    leftover = tmp_path / "checkpoints" / f"{UNFINISHED}step-000012"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half of it")
    with fresh_process():
        trainer = Trainer(config, tmp_path, data)
        assert trainer.step == 6
        assert trainer.run()
    assert not leftover.exists()
    assert_same_outcome(tmp_path, whole(**changes)[0])


def test_a_finished_run_stays_as_it_is(data, whole):
    run_dir, _, _ = whole()
    before = outcome(run_dir)
    trainer = Trainer(tiny_config(data.config), run_dir, data)
    assert trainer.run()
    assert outcome(run_dir) == before
    assert trainer.evaluation.bits_per_byte == before["lines"][-1]["val_bits_per_byte"]


def test_a_run_whose_end_is_moved_to_where_it_stands_is_evaluated(data, tmp_path):
    assert not at_step(Trainer(tiny_config(data.config), tmp_path, data), 7, stop).run()
    trainer = Trainer(tiny_config(data.config, steps=7), tmp_path, data)
    assert trainer.run()
    assert trainer.step == 7
    assert trainer.evaluation == evaluate(trainer.model, data, trainer.config, 1024)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "train.seed = 1"),
        ({"hidden_size": 64}, "64"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"optimizer": "muon"}, "train.optimizer = muon is not the adamw of the saved run"),
    ],
)
def test_another_seed_model_or_optimizer_is_refused(data, tmp_path, changes, words):
    assert not at_step(Trainer(tiny_config(data.config), tmp_path, data), 3, stop).run()
    with pytest.raises(ConfigError, match=words):
        Trainer(tiny_config(data.config, **changes), tmp_path, data)


# Numbers that are none


def spoil_gradient(trainer, value, step):
    trainer.model.norm.weight.register_hook(lambda grad: grad * (value if trainer.step + 1 == step else 1.0))


def spoil_loss(trainer, step):
    inner = trainer.model.losses

    def losses(*batch):
        found = inner(*batch)
        return dataclasses.replace(found, nll=found.nll * math.nan) if trainer.step + 1 == step else found

    trainer.model.losses = losses


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda trainer: spoil_gradient(trainer, math.nan, 9), "grad_norm = nan"),
        (lambda trainer: spoil_gradient(trainer, math.inf, 9), "grad_norm = inf"),
        (lambda trainer: spoil_loss(trainer, 9), "loss = nan"),
    ],
)
def test_a_step_that_is_not_finite_is_not_taken(data, whole, tmp_path, monkeypatch, spoil, name):
    config = tiny_config(data.config)
    trainer, kept = Trainer(config, tmp_path, data), {}
    at_step(
        trainer, 8, lambda: kept.update(w=weights_of(trainer.model), o=copy.deepcopy(trainer.optimizer.state_dict()))
    )
    spoil(trainer)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(NotFinite, match=rf"^step 9: {name}.*newest checkpoint is of step 6.* below 0.01") as raised:
        trainer.run()
    assert len(str(raised.value).splitlines()) == 1
    assert terminal.getvalue().endswith("\n")
    assert trainer.step == 8
    assert all(torch.equal(tensor, kept["w"][key]) for key, tensor in trainer.model.state_dict().items())
    for number, state in trainer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, kept["o"]["state"][number][key]) for key, value in state.items())
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 8
    assert checkpoints(tmp_path)[-1].name == "step-000006"
    assert all(parameter.isfinite().all() for parameter in load(tmp_path).parameters())
    with fresh_process():
        assert Trainer(config, tmp_path, data).run()
    assert_same_outcome(tmp_path, whole()[0])


def test_an_evaluation_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch):
    spoiled = Evaluation(math.nan, {"left": math.nan}, [[1]])
    trainer = Trainer(tiny_config(data.config), tmp_path, data)
    at_step(trainer, 12, lambda: monkeypatch.setattr(loop, "evaluate", lambda *_: spoiled))
    with pytest.raises(NotFinite, match=r"^step 12: val_bits_per_byte = nan.*newest checkpoint is of step 6"):
        trainer.run()
    assert checkpoints(tmp_path)[-1].name == "step-000006"


def test_a_run_without_a_checkpoint_says_so(data, tmp_path):
    trainer = Trainer(tiny_config(data.config), tmp_path, data)
    spoil_loss(trainer, 1)
    with pytest.raises(NotFinite, match=r"^step 1: loss = nan.*it has no checkpoint"):
        trainer.run()
    assert checkpoints(tmp_path) == []


def test_a_run_with_muon_is_told_of_both_rates(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, optimizer="muon"), tmp_path, data)
    spoil_loss(trainer, 1)
    with pytest.raises(NotFinite, match=r"learning_rate below 0\.01 or a train\.muon_learning_rate below 0\.01\.$"):
        trainer.run()
