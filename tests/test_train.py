"""Training against plain formulas: schedule, losses, metrics."""

import dataclasses
import io
import json
import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_run import MODEL, Terminal, tiny_config, weights_of
from torch.nn.functional import log_softmax

from moe_lm.config import ConfigError, TrainConfig
from moe_lm.data.packing import IGNORED
from moe_lm.model.attention import whole_rows
from moe_lm.train import Trainer, loop, memory, metrics
from moe_lm.train.evaluate import Evaluation, evaluate
from moe_lm.train.metrics import MetricsLog, ProgressLine, read_metrics
from moe_lm.train.schedule import batch_rows, learning_rate

pytestmark = pytest.mark.usefixtures("one_process")

KEYS = {
    "step", "tokens", "loss", "bits_per_byte", "aux_loss", "z_loss", "expert_load", "router_entropy",
    "router_confidence", "drop_rate", "dead_experts", "grad_norm", "learning_rate", "tokens_per_s", "mfu",
}  # fmt: skip
HELD_OUT_KEYS = {"val_bits_per_byte", "val_bits_per_byte_by_source", "val_dead_experts"}
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


# Losses


def test_losses_are_those_of_plain_loops(data, tmp_path):
    trainer = Trainer(tiny_config(data.config), tmp_path, data)
    model, batch = trainer.model, trainer.micro_batches()[0]
    with torch.no_grad():
        for block in model.layers:
            block.mlp.gate.weight.mul_(100)  # routers that prefer
        losses = model.losses(batch.tokens, batch.targets, batch.positions, batch.documents)
        _, routings = model.hidden_states(batch.tokens, batch.positions, whole_rows(batch.documents))
    aux, z, counts, entropies, confidences = [], [], [], [], []
    scored = (batch.targets >= 0).flatten().tolist()
    assert not all(scored)
    for routed in routings:
        slots, probability, squares, entropy, confidence = [0] * 4, [0.0] * 4, 0.0, 0.0, 0.0
        of_scored = [0] * 4
        logits = routed.logits.double().tolist()
        for row, counted in zip(logits, scored, strict=True):
            confidence += max(math.exp(logit) for logit in row) / sum(math.exp(logit) for logit in row) / len(logits)
            total = sum(math.exp(logit) for logit in row)
            squares += math.log(total) ** 2
            for expert, logit in enumerate(row):
                p = math.exp(logit) / total
                probability[expert] += p / len(logits)
                entropy -= p * math.log(p) / len(logits)
            for expert in sorted(range(4), key=lambda e: -row[e])[:2]:
                slots[expert] += 1
                of_scored[expert] += counted
        counts.append(of_scored)
        confidences.append(confidence)
        aux.append(4 * sum(slots[e] / sum(slots) * probability[e] for e in range(4)))
        z.append(squares / len(logits))
        entropies.append(entropy)
    assert max(aux) > 1.01
    assert losses.expert_counts.tolist() == counts
    assert losses.aux.item() == pytest.approx(sum(aux) / 2, rel=1e-5)
    assert losses.z.item() == pytest.approx(sum(z) / 2, rel=1e-5)
    assert losses.router_entropy.tolist() == pytest.approx(entropies, rel=1e-4)
    assert losses.router_confidence.tolist() == pytest.approx(confidences, rel=1e-4)
    assert losses.dropped.tolist() == [0, 0]
    config = dataclasses.replace(MODEL, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    assert losses.router_loss(config).item() == pytest.approx(0.25 * sum(aux) + 0.125 * sum(z), rel=1e-5)
    assert losses.nll.item() == pytest.approx(by_hand(model, batch), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "routing"),
    [
        ({"first_k_dense_replace": 1, "num_hidden_layers": 3}, 2),
        ({"expert_layer_period": 2, "num_hidden_layers": 4}, 2),
    ],
)
def test_dense_layers_beside_routing_ones_are_trained(changes, routing, data, tmp_path):
    trainer = Trainer(tiny_config(data.config, moe_intermediate_size=24, **changes), tmp_path, data)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    losses = [trainer.train_step() for _ in range(3)]
    assert losses[2]["loss"] < losses[0]["loss"]
    for (name, now), then in zip(trainer.model.named_parameters(), before, strict=True):
        assert not torch.equal(now, then), name
    for line in losses:
        assert len(line["expert_load"]) == len(line["router_entropy"]) == routing
        assert [sum(load) for load in line["expert_load"]] == pytest.approx([1] * routing, abs=1e-4)
    trainer.evaluate()
    assert len(trainer.evaluation.expert_counts) == routing


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_training_holds_is_foreseen(optimizer, data, tmp_path, monkeypatch):
    config = tiny_config(data.config, optimizer=optimizer, n_shared_experts=1)
    trainer = Trainer(config, tmp_path, data)
    batch = trainer.micro_batches()[0]
    trainer.model.losses(batch.tokens, batch.targets, batch.positions, batch.documents).nll.backward()
    parameters = list(trainer.model.parameters())
    held = [*parameters, *(parameter.grad for parameter in parameters)]
    trainer.optimizer.step()
    held += [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert memory.state_bytes(config) == needed
    monkeypatch.setattr(memory, "memory_of", lambda device: needed + memory.activation_bytes(config))
    memory.check_memory(config)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    with pytest.raises(ConfigError, match=r"GB for the activations of train.micro_batch_tokens = 256, and cpu has"):
        memory.check_memory(config)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=rf"to train, .* of train.optimizer = {optimizer}, and cpu has .* GB: lower "):
        memory.check_memory(config)
    monkeypatch.setattr(memory, "memory_of", lambda device: None)
    memory.check_memory(config)


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
    nats, sizes, scored = [], [], 0
    for index in range(2):
        batches = list(data.validation_batches(index, 32, 200, 1))
        assert len(batches) == 6  # rows of 32 tokens in 200
        nats.append(sum(by_hand(model, batch) for batch in batches))
        sizes.append(sum(data.token_bytes[batch.targets[batch.targets != IGNORED]].sum() for batch in batches))
        scored += sum(batch.num_targets for batch in batches)
    each = [nat / math.log(2) / size for nat, size in zip(nats, sizes, strict=True)]
    assert found.by_source == pytest.approx(dict(zip([s.name for s in data.sources], each, strict=True)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-5)
    assert 2 * 6 * 32 > scored > 2 * 5 * 32
    assert [sum(layer) for layer in found.expert_counts] == [scored * 2] * 2
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
