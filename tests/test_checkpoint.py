"""Checkpoint directories: complete or not there, the last good one always there, and no state of another model."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import MODEL

from moe_lm.checkpoint import directory
from moe_lm.checkpoint.directory import UNFINISHED, checkpoints, publish, replace_file
from moe_lm.checkpoint.train_state import load_train_state, save_train_state
from moe_lm.config import ConfigError, TrainConfig
from moe_lm.model import Transformer
from moe_lm.train.optim import make_optimizer


def writing(text):
    """What fills a checkpoint with a file and a folder."""

    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "state").write_text(text)

    return write


def breaking(folder: Path) -> None:
    (folder / "weights").write_text("half of")
    raise OSError("No space left on device")


def names(run_dir):
    return [path.name for path in checkpoints(run_dir)]


def entries(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Directories


def test_only_complete_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path):
    assert checkpoints(tmp_path) == []
    for name in (
        "step-1000000",
        "step-000020",
        "step-999999",
        f"{UNFINISHED}step-000030",
        "step-30",
        "step-000040.old",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert names(tmp_path) == ["step-000020", "step-999999", "step-1000000"]


def test_a_checkpoint_appears_whole(tmp_path):
    seen = []

    def write(folder):
        writing("new")(folder)
        seen.append(names(tmp_path))

    path = publish(tmp_path, 7, write, keep=2)
    assert seen == [[]]
    assert path == tmp_path / "checkpoints" / "step-000007"
    assert {p.relative_to(path).as_posix() for p in path.rglob("*")} == {"weights", "inner", "inner/state"}
    assert entries(tmp_path) == ["step-000007"]


def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    rename = Path.rename
    monkeypatch.setattr(directory, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append(f"{path.name} -> {to.name}") or rename(path, to))
    monkeypatch.setattr(shutil, "rmtree", lambda path: events.append(f"delete {path.name}"))
    publish(tmp_path, 1, writing("one"), keep=1)
    beside = f"{UNFINISHED}step-000001"
    assert sorted(events[:4]) == sorted(["weights", "inner", "state", beside])
    assert events[4:] == [f"{beside} -> step-000001", "checkpoints"]
    del events[:]
    publish(tmp_path, 2, writing("two"), keep=1)
    assert events[4:] == [
        f"{UNFINISHED}step-000002 -> step-000002",
        "checkpoints",
        f"step-000001 -> {beside}",
        "checkpoints",
        f"delete {beside}",
    ]


def test_a_checkpoint_that_is_there_is_left_as_it_is(tmp_path):
    publish(tmp_path, 7, writing("first"), keep=2)
    path = publish(tmp_path, 7, breaking, keep=2)
    assert (path / "weights").read_text() == "first"


def test_the_newest_are_kept(tmp_path):
    kept = [publish(tmp_path, step, writing(""), keep=3) and names(tmp_path) for step in (1, 2, 3, 4, 10)]
    assert kept[2:] == [
        ["step-000001", "step-000002", "step-000003"],
        ["step-000002", "step-000003", "step-000004"],
        ["step-000003", "step-000004", "step-000010"],
    ]
    publish(tmp_path, 11, writing(""), keep=1)
    assert entries(tmp_path) == ["step-000011"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_write_that_fails_leaves_the_good_ones_and_nothing_that_is_listed(tmp_path, keep):
    publish(tmp_path, 1, writing("good"), keep)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            publish(tmp_path, 2, breaking, keep)
        assert names(tmp_path) == ["step-000001"]
        assert (tmp_path / "checkpoints" / "step-000001" / "weights").read_text() == "good"
    publish(tmp_path, 3, writing("next"), keep)
    assert entries(tmp_path) == ["step-000001", "step-000003"][-keep:]


@pytest.mark.parametrize("call", ["rename", "flush", "rmtree"])
def test_a_disk_that_fails_at_any_call_leaves_a_good_one(tmp_path, monkeypatch, call):
    """The n-th call of each kind fails, for every n: old and new are each whole or not listed, and one is there."""
    failures = 0
    for n in range(12):
        run_dir = tmp_path / f"{call}-{n}"
        publish(run_dir, 1, writing("one"), keep=1)
        calls = iter(range(100))
        target = {"rename": Path, "flush": directory, "rmtree": shutil}[call]
        inner = getattr(target, call)

        def failing(*args, inner=inner, calls=calls, n=n):
            if next(calls) == n:
                raise OSError("Input/output error")
            return inner(*args)

        with monkeypatch.context() as patch:
            patch.setattr(target, call, failing)
            try:
                publish(run_dir, 2, writing("two"), keep=1)
            except OSError:
                failures += 1
        assert names(run_dir)
        for path in checkpoints(run_dir):
            text = {"step-000001": "one", "step-000002": "two"}[path.name]
            assert ((path / "weights").read_text(), (path / "inner" / "state").read_text()) == (text, text)
        publish(run_dir, 3, writing("three"), keep=1)
        assert entries(run_dir) == ["step-000003"]
    assert failures == {"rename": 2, "flush": 6, "rmtree": 1}[call]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    replace_file(path, "alt\n")
    replace_file(path, "new ✓\n")
    assert path.read_bytes() == "new ✓\n".encode()
    assert list(tmp_path.iterdir()) == [path]

    def refuse(*_):
        raise OSError("Input/output error")

    for target, call in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, call, refuse)
            with pytest.raises(OSError, match="Input/output"):
                replace_file(path, "half of the next")
        assert path.read_text("utf-8") == "new ✓\n"
    replace_file(path, "next\n")
    assert path.read_text("utf-8") == "next\n"
    assert list(tmp_path.iterdir()) == [path]


# Train state


def trained(**changes):
    """A model after two steps, and its optimizer."""
    model = Transformer(dataclasses.replace(MODEL, **changes)).reset_parameters()
    optimizer = make_optimizer(model, TrainConfig())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def test_a_state_comes_back_bit_for_bit(tmp_path):
    model, optimizer = trained()
    save_train_state(tmp_path, model, optimizer, {"step": 2, "loader": {"rows": [3, None]}})
    expected = torch.randn(5)
    other = Transformer(MODEL)
    fresh = make_optimizer(other, TrainConfig())
    torch.seed()
    progress = load_train_state(tmp_path, other, fresh)
    assert {key: progress[key] for key in ("step", "loader")} == {"step": 2, "loader": {"rows": [3, None]}}
    assert torch.equal(torch.randn(5), expected)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert set(optimizer.state[mine]) == set(fresh.state[theirs]) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, fresh.state[theirs][key]) for key, value in optimizer.state[mine].items())


def test_a_state_of_before_the_first_step_has_no_moments(tmp_path):
    model = Transformer(MODEL)
    save_train_state(tmp_path, model, make_optimizer(model, TrainConfig()), {"step": 0})
    optimizer = make_optimizer(model, TrainConfig())
    assert load_train_state(tmp_path, model, optimizer)["step"] == 0
    assert not optimizer.state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "holds the optimizer state of layers.1"),
        ({"num_hidden_layers": 3}, "lacks the optimizer state of layers.2"),
        ({"num_local_experts": 0}, "holds the optimizer state of layers.0.mlp"),
        ({"hidden_size": 64}, r"\[300, 32\], and this model's is \[300, 64\]"),
    ],
)
def test_the_state_of_another_model_is_refused_and_nothing_changed(tmp_path, changes, message):
    save_train_state(tmp_path, *trained(), {"step": 2})
    model, optimizer = trained(**changes)
    before = {key: value.clone() for key, value in optimizer.state[model.embed_tokens].items()}
    numbers = torch.get_rng_state()
    with pytest.raises(ConfigError, match=message) as raised:
        load_train_state(tmp_path, model, optimizer)
    assert len(str(raised.value).splitlines()) == 1
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[model.embed_tokens].items())


def test_weights_without_a_state_are_refused(tmp_path):
    model, optimizer = trained()
    with pytest.raises(ConfigError, match="holds weights but no train_state/: it can be loaded, not resumed"):
        load_train_state(tmp_path, model, optimizer)


def test_a_state_of_another_format_is_refused(tmp_path):
    model, optimizer = trained()
    save_train_state(tmp_path, model, optimizer, {"step": 2})
    progress = tmp_path / "train_state" / "progress.json"
    progress.write_text(progress.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ConfigError, match="format 99; this version reads format 1 only"):
        load_train_state(tmp_path, model, optimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the state here is no real one")
def test_a_state_from_a_gpu_is_read_without_one(tmp_path):
    model, optimizer = trained()
    save_train_state(tmp_path, model, optimizer, {"step": 2})
    file = tmp_path / "train_state" / "state.safetensors"
    save_file({**load_file(file), "rng/cuda": torch.zeros(16, dtype=torch.uint8)}, file)
    assert load_train_state(tmp_path, model, optimizer)["step"] == 2
