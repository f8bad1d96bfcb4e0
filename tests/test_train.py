"""Training against plain formulas: schedule, optimizer, losses, metrics; and runs that nothing can knock off course."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import os
import signal
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_run import MODEL, assert_same_outcome, outcome, tiny_config, write_corpus
from torch.nn.functional import log_softmax

from moe_lm import load
from moe_lm.bench import machine
from moe_lm.checkpoint.directory import UNFINISHED, checkpoints
from moe_lm.config import ConfigError, TrainConfig
from moe_lm.data import prepare_data
from moe_lm.data.packing import IGNORED
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.train import NotFinite, Trainer, loop, metrics
from moe_lm.train.evaluate import Evaluation, evaluate
from moe_lm.train.metrics import MetricsLog, ProgressLine, read_metrics
from moe_lm.train.optim import make_optimizer
from moe_lm.train.schedule import batch_rows, learning_rate

KEYS = {
    "step", "tokens", "loss", "bits_per_byte", "aux_loss", "z_loss", "expert_load", "router_entropy", "dead_experts",
    "grad_norm", "learning_rate", "tokens_per_s", "mfu",
}  # fmt: skip
HELD_OUT_KEYS = {"val_bits_per_byte", "val_bits_per_byte_by_source", "val_dead_experts"}
EVERYTHING = {
    "micro_batch_tokens": 96, "batch_tokens_start": 64, "batch_ramp_steps": 12, "router_jitter_noise": 0.1,
    "log_every": 2, "dtype": "bfloat16",
}  # fmt: skip
"""Settings under which a resume has most to get right: micro-batches, a ramp, random numbers, steps without a line."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def data(corpus):
    return prepare_data(corpus, 300)


@contextlib.contextmanager
def fresh_process():
    """What a new process has of its own: no measurement of the machine yet, and random numbers anywhere."""

    @functools.cache
    def measured(device, dtype):
        torch.randn(100)  # as the real one draws its matrices
        return 1e9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "gemm_rate", measured)
        torch.seed()
        yield


@pytest.fixture(autouse=True)
def _one_process():
    with fresh_process():
        yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A function from settings to the directory of an uninterrupted run with them, its trainer and its lines."""

    @functools.cache
    def run(**changes):
        run_dir = tmp_path_factory.mktemp("whole")
        with fresh_process():
            trainer = Trainer(tiny_config(data.config, **changes), run_dir, data)
            assert trainer.run()
        return run_dir, trainer, read_metrics(run_dir / "metrics.jsonl")

    return run


def at_step(trainer, step, act):
    """Have `act` called at the end of that step, before anything of it is logged or saved."""
    take = trainer.train_step

    def train_step():
        result = take()
        if trainer.step == step:
            act()
        return result

    trainer.train_step = train_step
    return trainer


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Schedule


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rate_warms_up_then_decays_to_the_floor(decay):
    config = TrainConfig(steps=201, learning_rate=3e-3, warmup=0.1, decay=decay, min_learning_rate_ratio=0.2)
    rates = [learning_rate(config, step) for step in range(1, 202)]
    assert rates[:20] == pytest.approx([3e-3 * step / 20 for step in range(1, 21)])
    assert rates[19] == rates[20] == pytest.approx(3e-3)
    assert all(after < before for before, after in pairwise(rates[20:]))
    assert rates[-1] == pytest.approx(0.2 * 3e-3)
    # Steps 21 to 201 decay; step 111 is half of the way, step 66 a quarter.
    assert rates[110] == pytest.approx(3e-3 * (0.2 + 0.8 * 0.5))
    quarter = (1 + math.sqrt(0.5)) / 2 if decay == "cosine" else 0.75
    assert rates[65] == pytest.approx(3e-3 * (0.2 + 0.8 * quarter))


def test_learning_rate_without_warmup_begins_at_the_peak_and_may_end_at_zero():
    config = TrainConfig(steps=10, learning_rate=1.0, warmup=0.0, min_learning_rate_ratio=0.0)
    assert learning_rate(config, 1) == 1.0
    assert learning_rate(config, 10) == 0.0


@pytest.mark.parametrize("length", [32, 48, 100])
def test_the_batch_ramps_in_whole_rows(length):
    config = TrainConfig(batch_tokens=1024, batch_tokens_start=128, batch_ramp_steps=30)
    rows = [batch_rows(config, length, step) for step in range(1, 41)]
    assert all(type(count) is int for count in rows)
    assert rows[0] == round(128 / length)
    assert rows[30:] == [round(1024 / length)] * 10
    assert all(0 <= after - before <= 1024 / length / 30 + 1 for before, after in pairwise(rows))
    exact = [(128 + (1024 - 128) * min(1, step / 30)) / length for step in range(40)]
    assert all(abs(count - value) <= 0.5 for count, value in zip(rows, exact, strict=True))


def test_without_a_ramp_every_batch_is_whole():
    assert {batch_rows(TrainConfig(batch_tokens=1024), 32, step) for step in (1, 2, 600)} == {32}


def test_a_batch_is_cut_into_micro_batches_that_fit(data, tmp_path):
    config = tiny_config(data.config, micro_batch_tokens=100, batch_tokens_start=32, batch_ramp_steps=10)
    trainer = Trainer(config, tmp_path, data)
    for step in range(15):
        trainer.step = step
        rows = [len(batch.tokens) for batch in trainer.micro_batches()]
        assert max(rows) <= 3
        assert sum(rows) == batch_rows(config.train, 32, step + 1)
    assert rows == [3, 3, 2]


# Optimizer


def test_norms_do_not_decay():
    model = Transformer(MODEL)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    names = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert names == {name: 0.0 if "norm" in name else 0.3 for name in names}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_the_token_table_may_learn_at_a_rate_of_its_own(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, embedding_learning_rate_ratio=4.0), tmp_path, data)
    rate = trainer.train_step()["learning_rate"]
    assert rate == learning_rate(trainer.config.train, 1)
    rates = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in trainer.model.named_parameters()}
    assert found == {name: rate * (4 if name == "embed_tokens" else 1) for name in found}


def test_a_step_is_adamw_by_hand():
    config = TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, adam_eps=1e-3)
    model = Transformer(MODEL).reset_parameters()
    optimizer = make_optimizer(model, config)
    by_hand = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step, rate in ((1, 1e-2), (2, 3e-2), (3, 2e-2)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient, (weight, first, second) = parameter.grad.double(), by_hand[name]
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            weight = weight * (1 - rate * (0.0 if "norm" in name else 0.3))
            weight = weight - rate * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
            by_hand[name] = [weight, first, second]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), by_hand[name][0], rtol=1e-5, atol=1e-6, msg=name)


def first_step(data, run_dir, **changes):
    """The clipped gradients of a run's first step, the weights after it, and its metrics."""
    # A large epsilon makes the update continuous in the gradient: at 1e-8 the sign of a gradient of 0 decides.
    trainer = Trainer(tiny_config(data.config, adam_eps=1e-3, warmup=0.0, **changes), run_dir, data)
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    )
    metrics = trainer.train_step()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return gradients, weights_of(trainer.model), metrics


@pytest.mark.parametrize(
    "model",
    [{"num_local_experts": 0}, {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}],
    ids=["dense", "experts"],
)
@pytest.mark.parametrize("micro_batch_tokens", [64, 96])
def test_micro_batches_add_up(data, tmp_path, model, micro_batch_tokens):
    once = first_step(data, tmp_path, **model)
    several = first_step(data, tmp_path, micro_batch_tokens=micro_batch_tokens, **model)
    for whole, parts in zip(once[:2], several[:2], strict=True):
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6, msg=name)
    for name in ("loss", "bits_per_byte", "grad_norm", "tokens"):
        assert several[2][name] == pytest.approx(once[2][name], rel=1e-5), name


def test_router_losses_of_micro_batches_count_by_their_rows(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, micro_batch_tokens=96), tmp_path, data)
    parts = []
    inner = trainer.model.losses
    trainer.model.losses = lambda *batch: parts.append((len(batch[0]), inner(*batch))) or parts[-1][1]
    metrics = trainer.train_step()
    assert [rows for rows, _ in parts] == [3, 3, 2]
    for name in ("aux", "z"):
        expected = sum(rows * getattr(losses, name).item() for rows, losses in parts) / 8
        assert metrics[f"{name}_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_gradients_are_scaled_down_to_the_limit(data, tmp_path, limit):
    gradients, _, metrics = first_step(data, tmp_path, max_grad_norm=limit)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert metrics["grad_norm"] > 0.1
    assert norm == pytest.approx(limit or metrics["grad_norm"], rel=1e-4)


# Losses


def test_losses_are_those_of_plain_loops(data, tmp_path):
    trainer = Trainer(tiny_config(data.config), tmp_path, data)
    model, batch = trainer.model, trainer.micro_batches()[0]
    with torch.no_grad():
        for block in model.layers:
            block.mlp.gate.weight.mul_(100)  # routers that prefer
        losses = model.losses(batch.tokens, batch.targets, batch.positions, batch.documents)
        _, routings = model.hidden_states(batch.tokens, batch.positions, whole_rows(batch.documents))
    aux, z, counts, entropies = [], [], [], []
    for routed in routings:
        slots, probability, squares, entropy = [0] * 4, [0.0] * 4, 0.0, 0.0
        logits = routed.logits.double().tolist()
        for row in logits:
            total = sum(math.exp(logit) for logit in row)
            squares += math.log(total) ** 2
            for expert, logit in enumerate(row):
                p = math.exp(logit) / total
                probability[expert] += p / len(logits)
                entropy -= p * math.log(p) / len(logits)
            for expert in sorted(range(4), key=lambda e: -row[e])[:2]:
                slots[expert] += 1
        counts.append(slots)
        aux.append(4 * sum(slots[e] / sum(slots) * probability[e] for e in range(4)))
        z.append(squares / len(logits))
        entropies.append(entropy)
    assert max(aux) > 1.01
    assert losses.expert_counts.tolist() == counts
    assert losses.aux.item() == pytest.approx(sum(aux) / 2, rel=1e-5)
    assert losses.z.item() == pytest.approx(sum(z) / 2, rel=1e-5)
    assert losses.router_entropy.tolist() == pytest.approx(entropies, rel=1e-4)
    config = dataclasses.replace(MODEL, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    assert losses.router_loss(config).item() == pytest.approx(0.25 * sum(aux) + 0.125 * sum(z), rel=1e-5)
    assert losses.nll.item() == pytest.approx(by_hand(model, batch), rel=1e-5)


def by_hand(model, batch):
    """Nats of the scored targets of a batch, summed."""
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, whole_rows(batch.documents))
    scored = batch.targets != IGNORED
    return -log_softmax(logits.double(), -1)[scored].gather(1, batch.targets[scored][:, None]).sum().item()


def test_loss_goes_down(whole):
    _, _, lines = whole()
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    held_out = [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line]
    assert held_out[-1] < held_out[0]


def test_held_out_bits_per_byte_by_hand(data, whole):
    _, trainer, _ = whole()
    model = trainer.model
    found = evaluate(model, data, trainer.config, 200)
    nats, sizes = [], []
    for index in range(2):
        batches = list(data.validation_batches(index, 32, 200, 1))
        assert len(batches) == 6  # rows of 32 tokens in 200
        nats.append(sum(by_hand(model, batch) for batch in batches))
        sizes.append(sum(data.token_bytes[batch.targets[batch.targets != IGNORED]].sum() for batch in batches))
    each = [nat / math.log(2) / size for nat, size in zip(nats, sizes, strict=True)]
    assert found.by_source == pytest.approx(dict(zip([s.name for s in data.sources], each, strict=True)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-5)
    assert [sum(layer) for layer in found.expert_counts] == [2 * 6 * 32 * 2] * 2
    assert found.dead_experts == sum(count == 0 for layer in found.expert_counts for count in layer)


def test_evaluation_leaves_no_trace(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, router_jitter_noise=0.5), tmp_path, data)
    trainer.model.train()
    before, numbers = weights_of(trainer.model), torch.get_rng_state()
    first, second = (evaluate(trainer.model, data, trainer.config, 256) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), numbers)
    assert trainer.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_last_evaluation_reads_four_times_as_much(data, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(loop, "evaluate", lambda *args: sizes.append(args[3]) or Evaluation(1.0, {}, [[1]]))
    assert Trainer(tiny_config(data.config, steps=13), tmp_path, data).run()
    assert sizes == [256, 256, 1024]


# Metrics


@pytest.mark.parametrize("experts", [4, 0])
def test_every_line_of_the_metrics_is_whole(whole, experts):
    run_dir, trainer, lines = whole(num_local_experts=experts)
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == lines
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        evaluated = line["step"] in (6, 12, 18, 20)
        assert set(line) == KEYS | (HELD_OUT_KEYS if evaluated else set())
        assert line["tokens"] == 256 * line["step"]
        assert line["learning_rate"] == learning_rate(trainer.config.train, line["step"])
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * trainer.flops_per_token / 1e9)
        assert line["tokens_per_s"] > 0
        assert 0 < line["bits_per_byte"] < line["loss"] / math.log(2)
        assert [len(layer) for layer in line["expert_load"]] == ([4, 4] if experts else [])
        assert all(sum(layer) == pytest.approx(1, abs=4e-5) for layer in line["expert_load"])
        assert all(0 <= entropy <= math.log(4) + 1e-5 for entropy in line["router_entropy"])
        assert (line["aux_loss"] > 0.9 and line["z_loss"] > 0) == bool(experts)
    last = lines[-1]
    assert last["val_bits_per_byte"] == trainer.evaluation.bits_per_byte
    assert last["val_bits_per_byte_by_source"] == trainer.evaluation.by_source
    assert list(last["val_bits_per_byte_by_source"]) == [source.name for source in trainer.data.sources]


def test_lines_beyond_the_checkpoint_are_dropped_and_a_torn_one_is_survived(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / step} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo', "utf-8")
    assert read_metrics(path) == lines
    log = MetricsLog(tmp_path, after=4, tensorboard=False)
    assert read_metrics(path) == lines[:2]
    log.write({"step": 6, "loss": 0.5})
    assert read_metrics(path) == [*lines[:2], {"step": 6, "loss": 0.5}]
    with pytest.raises(ValueError, match="JSON"):
        log.write({"step": 8, "loss": math.nan})
    log.close()
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install"):
        MetricsLog(tmp_path, after=0, tensorboard=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


LINE = {
    "step": 5, "loss": 3.21, "bits_per_byte": 1.98, "tokens_per_s": 9812.4, "mfu": 0.312,
    "expert_load": [[0.2, 0.3, 0.25, 0.25], [0.1, 0.4, 0.25, 0.25]],
}  # fmt: skip
TEXT = "step {}/20  loss 3.210  1.980 bits/byte  9,812 tok/s  MFU 31%  experts 0.4-1.6x  ETA {}"


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_progress_on_a_terminal_is_one_line_that_renews_itself(clock):
    stream = Terminal()
    line = ProgressLine(steps=20, done=4, stream=stream)
    shown = []
    for elapsed, step, last in ((10, 5, False), (10.1, 6, False), (10.3, 7, False), (10.4, 8, True)):
        clock.seconds = 100 + elapsed
        line.show({**LINE, "step": step}, last)
        shown.append(stream.getvalue().count("\r"))
    assert shown == [1, 1, 2, 3]  # not more often than five times a second, but for the last
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().startswith("\r\x1b[2K" + TEXT.format(5, "2:30"))
    line.note("held out")
    assert stream.getvalue().endswith("\r\x1b[2Kheld out\n")
    line.close()  # nothing to end
    assert stream.getvalue().endswith("out\n")
    line.show({**LINE, "step": 20}, last=True)
    line.close()
    assert stream.getvalue().endswith(TEXT.format(20, "0:00") + "\n")


def test_progress_in_a_file_is_a_line_now_and_then(clock):
    stream = io.StringIO()
    line = ProgressLine(steps=20, done=0, stream=stream)
    for elapsed, step in ((1, 1), (10, 5), (16.1, 6), (17, 7)):
        clock.seconds = 100 + elapsed
        line.show({**LINE, "step": step, "expert_load": []})
    line.note("held out")
    line.show({**LINE, "step": 8}, last=True)
    line.close()
    dense = TEXT.replace("  experts 0.4-1.6x", "")
    eta = [dense.format(1, "0:19"), dense.format(6, "0:38"), "held out", TEXT.format(8, "0:26")]
    assert stream.getvalue().splitlines() == eta
    assert stream.getvalue().endswith("\n")


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


def test_other_data_or_another_seed_is_refused(data, tmp_path):
    assert not at_step(Trainer(tiny_config(data.config), tmp_path, data), 3, stop).run()
    for changes in ({"seed": 1}, {"hidden_size": 64}, {"num_hidden_layers": 1}):
        with pytest.raises(ConfigError):
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
