"""Distillation: its loss against the plain formula, its runs against runs without it, and what it refuses."""

import dataclasses
import os
import signal

import pytest
import torch
from compare import assert_near
from tiny_run import EVERYTHING, MODEL, assert_same_outcome, at_step, fresh_process, tiny_config, weights_of
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.config import ConfigError, TrainConfig
from moe_lm.data.packing import IGNORED
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.scaling.counts import forward_flops_per_token, train_flops_per_token
from moe_lm.train import Trainer, distillation
from moe_lm.train.distillation import FusedDistillation, distillation_losses
from moe_lm.train.metrics import read_metrics
from moe_lm.train.page import training_charts
from moe_lm.train.report import progress_table

pytestmark = pytest.mark.usefixtures("one_process")

DRAFT = {"num_hidden_layers": 1, "num_local_experts": 0, "hidden_size": 16, "intermediate_size": 24}


def make_target(**changes):
    """A model that has its preferences: all its weights are ten times those that a run begins with."""
    config = dataclasses.replace(MODEL, initializer_range=0.2, **changes)
    return Transformer(config).reset_parameters(torch.Generator().manual_seed(1))


# The loss


def plain(x, weight, target_x, target_weight, targets, share):
    """Total, cross-entropy and acceptance in float64 by their formulas, over the rows that are scored."""
    scored = targets >= 0
    log_q = torch.log_softmax(x[scored].double() @ weight.double().t(), 1)
    nll = -(log_q * one_hot(targets[scored], len(weight))).sum()
    log_p = torch.log_softmax(target_x[scored].double() @ target_weight.double().t(), 1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    acceptance = (1 - (log_p.exp() - log_q.exp()).abs().sum(1) / 2).sum()
    return (1 - share) * nll + share * divergence, nll, acceptance


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_loss_and_gradients_are_those_of_the_formula(monkeypatch, rows, dtype, share):
    monkeypatch.setattr(distillation, "CHUNK", 8)
    x, target_x = torch.randn(rows, 12).to(dtype), torch.randn(rows, 20).to(dtype)
    weight, target_weight = torch.randn(37, 12) / 3, torch.randn(37, 20) / 3
    weight, target_weight = (w.to(dtype).float() for w in (weight, target_weight))
    targets = torch.randint(37, (rows,))
    targets[1::3] = IGNORED
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    wanted = [tensor.double().requires_grad_() for tensor in (x, weight)]
    found = FusedDistillation.apply(*inputs, target_x, target_weight, targets, share)
    expected = plain(*wanted, target_x, target_weight, targets, share)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    for name, one, other in zip(("total", "nll", "acceptance"), found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=rounding), name
    (3 * found[0]).backward()
    (3 * expected[0]).backward()
    for name, one, other in zip(("dx", "dweight"), inputs, wanted, strict=True):
        assert one.grad.dtype == one.dtype, name
        assert_near(one.grad, other.grad.float(), dtype, name)


def test_rows_that_are_not_scored_may_be_anything():
    x, target_x = torch.randn(6, 8), torch.randn(6, 8)
    weight, targets = torch.randn(11, 8), torch.tensor([3, IGNORED, 0, 10, IGNORED, 2])
    found = []
    for junk in (0.0, torch.nan):
        for rows in (x, target_x):
            rows[targets < 0] = junk
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        losses = FusedDistillation.apply(*inputs, target_x, weight, targets, 0.5)
        losses[0].backward()
        assert not inputs[0].grad[targets < 0].any()
        found.append([*(loss.detach() for loss in losses), *(tensor.grad for tensor in inputs)])
    for zeros, nans in zip(*found, strict=True):
        assert torch.equal(zeros, nans)


def test_the_host_waits_for_no_value():
    """On meta tensors, which hold none, a value that the host wants is an error."""
    x, weight = torch.empty(6, 8, device="meta"), torch.empty(11, 8, device="meta")
    targets = torch.empty(6, dtype=torch.int64, device="meta")
    FusedDistillation.apply(x.requires_grad_(), weight, x.detach(), weight, targets, 0.5)[0].backward()
    assert x.grad.shape == x.shape


class Largest(TorchDispatchMode):
    """The most float32 elements that any operation inside returned in a tensor with a vocabulary of columns."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.shape[-1:] == (300,):
                self.rows = max(self.rows, tensor.numel() // self.columns)
        return result


def test_no_more_logits_exist_at_once_than_those_of_a_chunk(data, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 40)
    config = tiny_config(data.config, distillation=0.5, **DRAFT)
    trainer = Trainer(config, tmp_path, data, make_target())
    with Largest(300) as seen:
        trainer.train_step()
    assert seen.rows == 40


# Training


def distilled(data, run_dir, target, **changes):
    return Trainer(tiny_config(data.config, **{"distillation": 0.5, **DRAFT, **changes}), run_dir, data, target)


def test_a_step_reports_text_and_target_apart(data, tmp_path):
    target = make_target()
    trainer = distilled(data, tmp_path, target, micro_batch_tokens=96)
    batches = trainer.micro_batches()
    trainer.loader = data.train_loader(0, 32)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        arguments = batch.tokens, batch.positions, whole_rows(batch.documents)
        with torch.no_grad():
            x, target_x = (model.hidden_states(*arguments)[0].flatten(0, -2) for model in (trainer.model, target))
            weights = trainer.model.output_weight, target.output_weight
            sums += torch.stack(plain(x, weights[0], target_x, weights[1], batch.targets.flatten(), 1.0)[1:])
    num_targets = sum(batch.num_targets for batch in batches)
    metrics = trainer.train_step()
    assert metrics["loss"] == pytest.approx(sums[0].item() / num_targets, rel=1e-5)
    assert trainer.flops_per_token == train_flops_per_token(trainer.config.model, 32) + forward_flops_per_token(
        target.config, 33 / 2
    )
    assert metrics["acceptance"] == pytest.approx(sums[1].item() / num_targets, rel=1e-5)


def test_the_target_is_left_as_it_is_and_without_noise(data, tmp_path):
    target = make_target(router_jitter_noise=0.5).train()
    before = weights_of(target)
    trainer = distilled(data, tmp_path, target)
    batch = trainer.micro_batches()[0]
    numbers = torch.get_rng_state()
    first, second = (distillation_losses(trainer.model, trainer.target, batch, 1.0).total for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), numbers)
    trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_distilled_draft_is_nearer_to_its_target(data, tmp_path):
    """A target whose taste is not that of the text: what the text alone cannot teach, it can."""
    target, found = make_target(), {}
    for share in (1e-9, 0.5, 1.0):  # the least one measures, and teaches nothing
        trainer = distilled(data, tmp_path / str(share), target, distillation=share, steps=40, hidden_size=32)
        (tmp_path / str(share)).mkdir()
        assert trainer.run()
        lines = read_metrics(tmp_path / str(share) / "metrics.jsonl")
        found[share] = sum(line["acceptance"] for line in lines[-5:]) / 5
    assert found[1e-9] + 0.05 < found[0.5]
    assert found[0.5] + 0.05 < found[1.0]


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_stopped_draft_goes_on_as_if_it_had_not_been(data, tmp_path, changes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run_dir in (whole, stopped):
        run_dir.mkdir()
    with fresh_process():
        assert distilled(data, whole, make_target(), **changes).run()
    trainer = distilled(data, stopped, make_target(), **changes)
    assert not at_step(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGTERM)).run()
    with fresh_process():
        resumed = distilled(data, stopped, make_target(), **changes)
        assert resumed.step == 7
        assert resumed.run()
    assert_same_outcome(whole, stopped)


# What is refused


def test_what_cannot_be_distilled_is_refused(data, tmp_path):
    for target, changes, words in (
        (None, {}, r"train.distillation = 0.5 needs a target: train this as the draft of another config, or set it"),
        (make_target(vocab_size=310), {}, r"needs one vocabulary, and the target's vocab_size = 310 is not .* 300: "),
        (make_target(), {"num_local_experts": 4}, r"needs a dense draft, and model.num_local_experts = 4: "),
    ):
        with pytest.raises(ConfigError, match=words):
            distilled(data, tmp_path, target, **changes)


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ConfigError, match=rf"train.distillation = {weight} must be between 0 and 1"):
        TrainConfig(distillation=weight)


# The report


def test_the_report_shows_the_acceptance_of_what_is_distilled(data, tmp_path):
    trainer = distilled(data, tmp_path, make_target())
    assert trainer.run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    without = [{name: value for name, value in line.items() if name != "acceptance"} for line in lines]
    table = progress_table(lines)
    assert table.header[-1] == "acceptance"
    assert table.rows[0][-1] == f"{lines[0]['acceptance']:.1%}"
    assert progress_table(without).header == table.header[:-1]
    charts = training_charts({"model": without, "draft": lines})
    begins = f"draft from {100 * lines[0]['acceptance']:.4g} at step 1"
    assert f"Acceptance, % of guesses at temperature 1, on training batches: {begins}" in charts
    assert "Acceptance" not in training_charts({"model": without})
