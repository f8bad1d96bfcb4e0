"""train.py as it is called: to the end, interrupted, resumed, killed, and told what cannot work."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import assert_same_outcome, outcome, tiny_config, write_corpus

import train
from moe_lm import load
from moe_lm.bench import machine
from moe_lm.checkpoint.directory import checkpoints, step_of
from moe_lm.cli import run_main
from moe_lm.toml import load_config, to_toml
from moe_lm.train.metrics import read_metrics

TRAIN = Path(train.__file__).resolve()
CONFIGS = TRAIN.parent / "configs"
FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "train_state/progress.json", "train_state/state.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus, tiny.toml and beside it draft.toml."""
    root = tmp_path_factory.mktemp("place")
    data = write_corpus(root / "corpus")
    config = tiny_config(data, draft="draft.toml", batch_tokens=1024, micro_batch_tokens=512)
    draft = tiny_config(data, every=3, num_hidden_layers=1, num_local_experts=0, steps=8, distillation=0.5)
    (root / "tiny.toml").write_text(to_toml(config), "utf-8")
    (root / "draft.toml").write_text(to_toml(draft), "utf-8")
    return root


def start(place, *arguments):
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments],
        cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    """Standard output and error of a process that must end well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def finished(place):
    """The directory of a run that nothing disturbed, and what it printed."""
    return place / "runs" / "tiny", *finish(start(place, "tiny.toml"))


@pytest.fixture
def call(place, monkeypatch, capfd):
    """A function from arguments to exit status, standard error and output of train.py, called in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    monkeypatch.setattr(machine, "gemm_rate", lambda device, dtype: 1e9)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_main(train.main)
        out, err = capfd.readouterr()
        return exit_.value.code, err, out

    return run


def samples_of(out):
    return out.partition("\nspeculative decoding")[0]


def test_a_run_ends_with_everything_in_its_directory(finished):
    run_dir, out, err = finished
    assert out.startswith("\n--- 'ban dora'\nban dora")
    table = out.partition("speculative decoding, drafts of 2 tokens\n")[2].splitlines()
    assert table[0].split() == ["plain", "with", "draft", "speed-up", "accepted", "tokens/step"]
    assert [line.split("  ")[0] for line in table[1:3]] == ["greedy", "temperature 0.7"]
    assert "2 layers" in (run_dir / "report.md").read_text()
    assert f"report: {Path('runs/tiny/report.md')} and {Path('runs/tiny/report.html')}" in err
    assert "\x1b" not in err  # no terminal, no live line
    for folder, steps, kept in ((run_dir, 20, [18, 20]), (run_dir / "draft", 8, [6, 8])):
        assert [step_of(path) for path in checkpoints(folder)] == kept
        for path in checkpoints(folder):
            assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == FILES
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(("acceptance" in line) == (folder.name == "draft") for line in lines)
        config = load_config(folder / "config.toml")
        assert config.train.steps == steps
        assert load(folder).config == config.model
    names = {"config.toml", "metrics.jsonl", "report.md", "report.html", "checkpoints", "draft"}
    assert {path.name for path in run_dir.iterdir()} == names
    assert {path.name for path in (run_dir / "draft").iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints"}


def test_an_interrupted_run_is_resumed_to_the_same_end(place, finished):
    run_dir = place / "runs" / "stopped"
    process = start(place, "tiny.toml", "--run-dir", "runs/stopped")
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and read_metrics(run_dir / "metrics.jsonl"), process)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = finish(process)
    assert time.monotonic() - asked < 10
    assert out == ""
    step = step_of(checkpoints(run_dir)[-1])
    assert 1 <= step < 20
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, step + 1))
    assert f"stopped after step {step}; everything is saved in runs/stopped/checkpoints/step-{step:06d}\n" in err
    assert err.endswith("continue with: python train.py --resume runs/stopped\n")
    out, err = finish(start(place, "--resume", "runs/stopped"))
    assert f"resumed at step {step}" in err
    assert samples_of(out) == samples_of(finished[1])
    assert_same_outcome(run_dir, finished[0])
    assert_same_outcome(run_dir / "draft", finished[0] / "draft")


def wait_until(condition, process):
    """Wait for something that `process`, which must not end before, will do."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_finished_run_that_is_resumed_talks_again(call, finished):
    run_dir, first, _ = finished
    before, report = outcome(run_dir), (run_dir / "report.md").read_text()
    seconds = re.search(r"training time +\| +(\S+ s)", report)[1]
    (run_dir / "report.md").unlink()
    status, err, out = call("--resume", "runs/tiny")
    assert (status, "resumed at step 20" in err) == (0, True)
    assert samples_of(out) == samples_of(first)
    assert outcome(run_dir) == before
    again = (run_dir / "report.md").read_text()
    assert re.search(r"training time +\| +(\S+ s)", again)[1] == seconds
    assert "--resume runs/tiny" in again


def test_a_resumed_run_may_be_given_new_settings(call, place):
    assert call("tiny.toml", "--draft", "none", "--run-dir", "runs/longer", "--train.steps", 3)[0] == 0
    status, err, _ = call("--resume", "runs/longer", "--train.steps", 5)
    assert (status, "resumed at step 3" in err) == (0, True)
    assert load_config(place / "runs" / "longer" / "config.toml").train.steps == 5
    assert step_of(checkpoints(place / "runs" / "longer")[-1]) == 5


def test_a_loss_that_is_not_finite_ends_the_run_with_one_sentence(call, place):
    settings = ("--draft", "none", "--run-dir", "runs/wild", "--checkpoint.every", 1)
    status, err, _ = call("tiny.toml", *settings, "--train.learning_rate", 1e30, "--train.warmup", 0)
    assert status == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(r"step \d+: \S+ = (nan|inf), so runs/wild stops and its newest checkpoint is of step .*", last)
    assert "Traceback" not in err
    found = checkpoints(place / "runs" / "wild")[-1]
    assert step_of(found) < int(re.match(r"step (\d+)", last)[1])
    assert all(parameter.isfinite().all() for parameter in load(found).parameters())


def test_what_cannot_work_is_one_line_and_status_2(call, place, finished):
    before = (finished[0] / "config.toml").read_text()
    (place / "runs" / "empty").mkdir(exist_ok=True)
    for arguments, message in {
        ("--resume", "runs/tine"): "--resume runs/tine holds no run (no config.toml): name the directory of one.",
        ("--resume", "runs/empty"): "--resume runs/empty holds no run (no config.toml): name the directory of one.",
        ("tiny.toml", "--resume", "runs/tiny"): "--resume runs/tiny goes on with the config in it: leave out CONFIG",
        ("--resume", "runs/tiny", "--run-dir", "x"): "--resume runs/tiny goes on with the config in it: leave out",
        ("tiny.toml", "--run-dir", "runs/tiny"): "run_dir = runs/tiny holds a run already: continue it with --resume",
        (
            "--resume",
            "runs/tiny",
            "--draft",
            "tiny.toml",
        ): "draft = tiny.toml is not the draft.toml that runs/tiny began",
        ("tiny.toml", "--draft", "dratf.toml"): "no config file dratf.toml; did you mean",
        ("draft.toml", "--run-dir", "x"): "train.distillation = 0.5 needs a target: train this as the draft of",
        ("tiny.toml", "--run-dir", "tiny.toml"): "run_dir = tiny.toml cannot be written: ",
        ("tiny.toml", "--train.device", "cuda:9", "--run-dir", "x"): "device = 'cuda:9' is not there",
        (
            "tiny.toml",
            "--model.uniform_routing",
            "true",
            "--run-dir",
            "x",
        ): "model.uniform_routing = true is for benchmarks",
        ("tiny.toml", "--model.mamba", "{}", "--run-dir", "x"): "model.mamba is counted and planned by moe_lm.scaling",
        (CONFIGS / "jamba-52b.toml", "--run-dir", "x"): "model.mamba is counted and planned by moe_lm.scaling",
        (CONFIGS / "gpt4-1.8t.toml", "--run-dir", "x"): "1,809.75B parameters take 28,955.9 GB to train, 16 bytes each",
    }.items():
        status, err, _ = call(*arguments)
        assert (status, err.splitlines()[-1].startswith(message)) == (2, True), err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1
    assert not (place / "x").exists()
    assert (finished[0] / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.hidden_size", 64, "correct the config"),
        ("model.num_hidden_layers", 1, "correct the config"),
        ("train.seed", 1, "train.seed = 1 is not the 0 of the saved run"),
        ("data.validation_fraction", 0.5, "does not give the tokens that the saved run read"),
    ],
)
def test_a_setting_that_does_not_fit_the_checkpoint_leaves_the_run_as_it_was(call, finished, setting, value, message):
    run_dir, *_ = finished
    files = [run_dir / name for name in ("config.toml", "metrics.jsonl", "draft/config.toml")]
    before = [file.read_bytes() for file in files]
    status, err, _ = call("--resume", "runs/tiny", f"--{setting}", value)
    assert status == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [file.read_bytes() for file in files] == before


def test_a_run_whose_data_cannot_be_prepared_leaves_its_name_free(call):
    arguments = ("tiny.toml", "--draft", "none", "--run-dir", "runs/again", "--train.steps", 1)
    status, err, _ = call(*arguments, "--data.validation_fraction", 0.000001)
    assert (status, "holds out none of the" in err) == (2, True)
    assert call(*arguments)[0] == 0


def test_a_resumed_run_may_leave_its_draft_out(call, finished):
    before = outcome(finished[0] / "draft")
    status, _, out = call("--resume", "runs/tiny", "--draft", "none")
    assert (status, "speculative" in out) == (0, False)
    assert outcome(finished[0] / "draft") == before
    assert call("--resume", "runs/tiny", "--draft", "draft.toml")[0] == 0


def test_names_of_runs_are_counted_on(call, place, finished):
    assert call("tiny.toml", "--draft", "none", "--train.steps", 1)[0] == 0
    assert (place / "runs" / "tiny-2" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(place):
    """kill -9 at random moments, most of them in training, of which writing checkpoints is a good part."""
    settings = ("--draft", "none", "--train.steps", "400", "--checkpoint.every", "3", "--train.batch_tokens", "256")
    finish(start(place, "tiny.toml", *settings, "--run-dir", "runs/undisturbed"))
    run_dir, draw, moments = place / "runs" / "killed", random.Random(0), []
    log = run_dir / "metrics.jsonl"
    arguments = ("tiny.toml", *settings, "--run-dir", "runs/killed")
    for number in range(20):
        before = step_of(checkpoints(run_dir)[-1]) if checkpoints(run_dir) else 0
        old = log.stat().st_ino if log.exists() else None
        process = start(place, *arguments)
        if number % 5:
            wait_until(lambda old=old: log.exists() and log.stat().st_ino != old, process)  # it opens its metrics
            time.sleep(draw.uniform(0, 0.5))
        else:
            time.sleep(draw.uniform(0.5, 8))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        found = checkpoints(run_dir)
        unfinished = list(run_dir.glob("checkpoints/.*"))
        moments.append((step_of(found[-1]) if found else 0, len(read_metrics(log)), len(unfinished)))
        if found:
            assert step_of(found[-1]) >= before
            assert all(parameter.isfinite().all() for parameter in load(run_dir).parameters())
        if (run_dir / "config.toml").exists():
            arguments = ("--resume", "runs/killed")
    finish(start(place, *arguments))
    print(json.dumps({"checkpoint, last line, unfinished directories after each kill": moments}))
    assert_same_outcome(run_dir, place / "runs" / "undisturbed")
    assert not list(run_dir.glob("checkpoints/.*"))
    assert len({step for step, *_ in moments}) > 10
