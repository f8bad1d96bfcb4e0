"""The benchmark of training: its figures come from the steps they claim to, and the peer computes the same model."""

import contextlib
import io
import json
import math
import runpy
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_run import MODEL

from moe_lm.bench import machine, train, train_parts, train_peer
from moe_lm.bench.train_step import TrainingStep
from moe_lm.bench.workload import SHAPES
from moe_lm.config import ConfigError, DataConfig, RunConfig, TrainConfig
from moe_lm.scaling.counts import parameters, train_flops_per_token
from moe_lm.toml import load_config

pytestmark = pytest.mark.usefixtures("one_thread")

GEMM = 1e12


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A tiny mixture in a file."""
    fields = {name: getattr(MODEL, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_local_experts", "max_position_embeddings",
    )}  # fmt: skip
    path = tmp_path_factory.mktemp("bench") / "mini.toml"
    path.write_text("[model]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())
                    + "[data]\nsequence_length = 16\n", "utf-8")  # fmt: skip
    return path


@pytest.fixture
def gemm(monkeypatch):
    """A machine whose matrix rate is known, and bfloat16 its faster dtype."""
    rate = lambda device, dtype: GEMM if dtype == torch.bfloat16 else GEMM / 2  # noqa: E731
    rate.__wrapped__ = rate
    monkeypatch.setattr(machine, "gemm_rate", rate)
    monkeypatch.setattr(train, "tune_process", lambda: None)


MINI = ["--rows", "2", "--length", "16", "--turns", "3", "--steps", "1"]


def figures(config_file, *words):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        train.main([str(config_file), *MINI, "--json", *words])
    return json.loads(shown.getvalue())


def mini_step(**changes):
    names = {"router_jitter_noise", "num_hidden_layers"}
    model = replace(MODEL, **{name: value for name, value in changes.items() if name in names})
    settings = {"device": "cpu", "dtype": "float32"} | {k: v for k, v in changes.items() if k not in names}
    return TrainingStep(
        RunConfig(model=model, data=DataConfig(sequence_length=16), train=TrainConfig(batch_tokens=40, **settings))
    )


def test_every_figure_against_transformers(config_file, gemm):
    found = figures(config_file, "--against", "transformers")
    model = load_config(config_file).model
    flops = train_flops_per_token(model, 16)
    assert found["flops_per_token"] == flops
    assert found["parameters"] == parameters(model).total
    assert found["machine"]["gemm_range"] == [GEMM, GEMM]
    assert found["machine"]["dtype"] == "bfloat16"
    for name in ("ours", "transformers"):
        each = found[name]
        assert each["mfu"] == pytest.approx(each["tokens_per_s"] * flops / GEMM)
        assert each["step_ms"] == pytest.approx(2 * 16 * 1000 / each["tokens_per_s"])
        assert each["range"][0] <= each["tokens_per_s"] <= each["range"][1]
    peer = found["transformers"]
    assert found["ratio"]["of_medians"] == pytest.approx(found["ours"]["tokens_per_s"] / peer["tokens_per_s"])
    assert found["ratio"]["range"][0] <= found["ratio"]["range"][1]
    ways = {f"{name} experts, {form}" for name in train_peer.EXPERTS for form in train_peer.FORMS}
    assert set(peer["trials"]) | set(peer["not_measured"]) == ways
    assert len(peer["trials"]) >= 4
    assert peer["setting"] == max(peer["trials"], key=peer["trials"].get)
    parts = {line["part"]: line for line in found["parts"]}
    assert list(parts) == list(train_parts.PARTS)
    assert sum(line["share"] for line in found["parts"]) == pytest.approx(1)
    total = sum(line[f"{way}_ms"] for line in found["parts"] for way in train_parts.DIRECTIONS)
    assert total == pytest.approx(found["parts_step_ms"])
    for name in ("embedding", "attention", "router", "experts", "norms", "loss"):
        assert parts[name]["forward_ms"] > 0, name
        assert parts[name]["backward_ms"] > 0, name
        assert parts[name]["recomputed_ms"] == 0, name
    text = "\n".join(train.lines(found))
    assert "ratio of medians" in text
    assert "MFU" in text
    assert peer["setting"] in text


def test_ratio_and_mfu_are_of_medians():
    ours, theirs, gemm = [4.0, 30.0, 9.0], [2.0, 1.0, 3.0], [10.0, 40.0, 20.0]
    assert train.ratio(ours, theirs) == {"of_medians": 9.0 / 2.0, "range": [2.0, 30.0]}
    found = train.record(ours, 18, 5.0, gemm)
    assert found["tokens_per_s"] == statistics.median(ours)
    assert found["range"] == [4.0, 30.0]
    assert found["mfu"] == 9.0 * 5.0 / 20.0
    assert found["step_ms"] == 2000.0


def test_steps_are_the_training_loops_own(gemm, monkeypatch):
    """Trainer.train_step takes them, and the clock changes nothing in what they compute."""
    plain, timed = mini_step(), mini_step()
    assert plain.rows == 2
    assert plain.tokens == 32
    parts = train_parts.StepParts(timed)
    for _ in range(2):
        plain.step()
        parts.take()
    for a, b in zip(plain.model.parameters(), timed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.trainer.step == timed.trainer.step == 5
    assert plain.trainer.train_step()["loss"] < math.log(MODEL.vocab_size)
    # Nothing is left behind.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in timed.model.modules())
    assert "losses" not in vars(timed.model)
    assert not parts.booked
    assert not parts.handles


def test_steps_are_read_as_in_a_run():
    step = mini_step()
    assert step.trainer.unread == []
    step.trainer.behind = 1
    for number in (4, 5):
        step.step()
        assert [each.number for each in step.trainer.unread] == [number]


def test_parts_sum_to_the_step_of_the_clock(gemm, monkeypatch):
    """A clock that moves by 1 whenever it is read: every reading lies in exactly one part."""
    readings = iter(range(10**9))
    step = mini_step(activation_checkpointing=True)
    parts = train_parts.StepParts(step)
    monkeypatch.setattr(train_parts.time, "perf_counter", lambda: next(readings))
    first = next(readings)
    monkeypatch.setattr(parts, "book", lambda results, part: None)  # the clock does not rest
    parts.take()
    # The loop reads the time twice for its own metrics.
    assert sum(parts.mean().values()) == next(readings) - first - 2
    seconds = parts.mean()
    assert seconds["experts", "recomputed"] == seconds["experts", "forward"]


def test_backward_is_booked_where_the_forward_was(gemm):
    """Every node of the graph belongs to a part: experts' to experts, also those behind the router's choice."""
    step = mini_step()
    parts = train_parts.StepParts(step)
    names = {}
    switcher = parts.switcher

    def noting(part):
        hook = switcher(part)
        return lambda grads: (names.setdefault(part, 0), names.__setitem__(part, names[part] + 1), hook(grads))[2]

    parts.switcher = noting
    parts.take()
    assert {part for part, _ in names} == {"embedding", "attention", "router", "experts", "norms", "loss"}
    assert {way for _, way in names} == {"backward"}
    # Both weights' AccumulateGrad and the operation itself, in each of two layers.
    assert names["experts", "backward"] >= 2 * 3


def test_the_forward_returns_to_what_a_module_stood_in(gemm, monkeypatch):
    """One layer and what follows it: a block is norms but for what stands in it, and experts stand in the router."""
    seen = []
    switch = train_parts.Clock.switch
    monkeypatch.setattr(train_parts.Clock, "switch", lambda self, part: seen.append(part) or switch(self, part))
    parts = train_parts.StepParts(mini_step(num_hidden_layers=1))
    parts.take()
    first = seen.index(("embedding", "forward"))
    forward = [name for name, way in seen[first : seen.index(("loss", "backward"))] if way == "forward"]
    found = [name for i, name in enumerate(forward) if not i or name != forward[i - 1]]
    assert found == ["embedding", "norms", "attention", "norms", "router", "experts", "router", "norms", "embedding",
                     "norms", "loss"]  # fmt: skip


@pytest.mark.parametrize("form", [*train_peer.FORMS, "float32"])
def test_the_peer_learns_the_same(gemm, form):
    """From the same weights on the same tokens its loss is ours, and every form's steps lower it alike."""
    ours = mini_step()
    peer = train_peer.PeerStep(ours, form)
    losses, mine = [peer.step() for _ in range(4)], ours.trainer.train_step()
    # Its load-balancing loss counts every choice, so it is top-k times ours.
    expected = mine["loss"] + 2 * 0.01 * mine["aux_loss"]
    assert losses[0] == pytest.approx(expected, abs=2e-3 if form == "float32" else 0.02)
    assert losses[3] < losses[0] - 0.1
    assert {parameter.dtype for parameter in peer.optimizer.param_groups[0]["params"]} == {torch.float32}
    if form == "bfloat16 copies":
        for master, copy in zip(peer.masters, peer.copies, strict=True):
            assert torch.equal(master.to(torch.bfloat16), copy)
            assert copy.grad is None


def test_the_fastest_form_is_taken_and_failures_are_named(gemm, monkeypatch):
    ours = SimpleNamespace(dtype="bfloat16", tokens=1 << 20, run=RunConfig(), device=torch.device("cpu"))

    class Step:
        own_experts, version = "grouped_mm", "5"

        def __init__(self, ours, form):
            self.form = form

        def choose_experts(self, name):
            self.name = name

        def step(self):
            if self.name == "eager":
                raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(train_peer, "memory_of", lambda device: 10**9)
    monkeypatch.setattr(train_peer, "tokens_per_second", lambda step, steps: 5.0 if step.form == "autocast" else 3.0)
    peer = train_peer.Peer(ours, make=Step)
    assert peer.setting == "grouped_mm experts, autocast"
    assert (peer.step.form, peer.step.name) == ("autocast", "grouped_mm")
    assert peer.failures["eager experts, autocast"] == "RuntimeError: no such kernel"
    assert "GB of gathered weights" in peer.failures["batched_mm experts, autocast"]
    monkeypatch.setattr(Step, "choose_experts", lambda self, name: 1 / 0)
    with pytest.raises(ConfigError, match=r"cannot train this model: .*division"):
        train_peer.Peer(ours, make=Step)


def test_shapes_of_the_bars():
    """Small is said to have 213 million parameters; with the vocabulary of tiny it has 214.5 with heads of 64 channels,
    and no number of heads makes it 213."""
    tiny, small = SHAPES["tiny"], SHAPES["small"]
    for shape, sizes in ((tiny, (256, 4, 16, 512)), (small, (512, 8, 16, 1024))):
        assert (shape.hidden_size, shape.num_hidden_layers, shape.num_local_experts, shape.expert_size) == sizes
        assert (shape.vocab_size, shape.num_key_value_heads, shape.num_experts_per_tok) == (8192, 1, 2)
    assert parameters(tiny).total == pytest.approx(30e6, rel=0.01)
    assert parameters(small).total == pytest.approx(213e6, rel=0.01)
    others = [parameters(replace(small, num_attention_heads=heads, head_dim=None)).total for heads in (1, 2, 4, 8, 16)]
    assert min(others) > 213.9e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--length", "1"], "--length 1 must be at least 2"),
        (["--turns", "0"], "--turns 0 must be at least 1"),
        (["--length", "5000"], "data.sequence_length = 5000 is longer than"),
        (["--train.batch-tokens", "512"], "--train.batch_tokens means nothing here: use --rows"),
        (["--train.optimizer=muon"], "--train.optimizer means nothing here: use --optimizer"),
        (["--shape", "tiny", "--model.num_hidden_layers", "2"], "and --shape tiny exclude each other"),
        (["--shape", "huge"], "invalid choice: 'huge'"),
        (["--against", "vllm"], "invalid choice: 'vllm'"),
    ],
)
def test_refusals(words, message, config_file):
    with pytest.raises(ConfigError, match=message):
        train.main([str(config_file), *words])


def test_a_missing_library_is_one_sentence(config_file, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--against transformers needs that package, which is not installed: pip"):
        train.main([str(config_file), "--against", "transformers"])


def test_the_command_without_a_peer(config_file, gemm, monkeypatch, capsys):
    words = ["train", str(config_file), *MINI, "--optimizer", "muon", "--train.activation_checkpointing", "true"]
    monkeypatch.setattr(sys, "argv", ["moe_lm.bench", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("moe_lm.bench", run_name="__main__")
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "muon, blocks computed again in the backward" in shown
    assert "transformers" not in shown
    assert "recomputed" in shown
