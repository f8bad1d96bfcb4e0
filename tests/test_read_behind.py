"""Metrics that are read a step later, as on a GPU, which then never waits for the host."""

import math

import pytest
import torch
from test_resume import spoil_gradient, spoil_loss
from tiny_run import EVERYTHING, assert_same_outcome, fresh_process, tiny_config
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lm.checkpoint.directory import checkpoints
from moe_lm.data.packing import Batch
from moe_lm.train import NotFinite, Trainer, loop
from moe_lm.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_process", "one_thread")


def behind(trainer: Trainer) -> Trainer:
    trainer.behind = 1
    return trainer


NUMBER = ("number", 0, False)
BATCH = [("meta", 2, True)] * 4
NUMBERS = [("cpu", 1, True)]


class Crossings(TorchDispatchMode):
    """Numbers read from tensors, and copies between the host and the device `meta`, whose tensors hold no values: the
    host's get zeros."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int, bool]] = []
        """Where to (`cpu`, `meta`; `number` where one is read), how many axes, and whether nobody waits for it."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(NUMBER)
        if op is torch.ops.aten._to_copy.default and "device" in kwargs and args[0].device != kwargs["device"]:
            self.seen.append((kwargs["device"].type, args[0].dim(), kwargs.get("non_blocking", False)))
            if kwargs["device"].type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return op(*args, **kwargs)


@pytest.fixture
def valueless(monkeypatch):
    """Trainers compute on `meta`, where reading a number raises, as does an operation on tensors of two devices, and
    one whose result is as long as its values say: all that a GPU would make the host wait for."""
    monkeypatch.setattr(loop, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(loop.machine, "gemm_rate", lambda *of: 1e12)
    for module, name in ((_foreach_utils, "_get_foreach_kernels_supported_devices"),
                         (optimizer, "_get_fused_kernels_supported_devices")):  # fmt: skip
        known = getattr(module, name)()
        monkeypatch.setattr(module, name, lambda known=known: [*known, "meta"])


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"optimizer": "muon", "expert_capacity_factor": 1.0}])
def test_a_step_begins_without_a_read(changes, data, tmp_path):
    trainer = behind(Trainer(tiny_config(data.config, **changes), tmp_path, data))
    with Crossings() as crossings:
        step = trainer.take_step()
        assert crossings.seen == []
        step.numbers.host[0].item()
    assert crossings.seen == [NUMBER]
    assert math.isfinite(trainer.read_step(step)["loss"])


@pytest.mark.parametrize(("changes", "batches"), [
    ({}, 1), (EVERYTHING, 1), ({"router_bias_update_rate": 0.01, "n_shared_experts": 1, "micro_batch_tokens": 96}, 3),
    ({"optimizer": "muon", "expert_capacity_factor": 1.0, "activation_checkpointing": True}, 1),
])  # fmt: skip
def test_a_step_waits_for_no_device(changes, batches, data, tmp_path, valueless):
    trainer = Trainer(tiny_config(data.config, **changes), tmp_path, data)
    assert trainer.behind
    for _ in range(2):
        with Crossings() as crossings:
            step = trainer.take_step()
        assert crossings.seen == batches * BATCH + NUMBERS
        assert step.metrics.keys() >= {"loss", "grad_norm", "expert_load"}


def add_to_losses(trainer: Trainer, wait) -> Trainer:
    losses = trainer.model.losses

    def waiting(*batch):
        found = losses(*batch)
        wait(found.nll)
        return found

    trainer.model.losses = waiting
    return trainer


@pytest.mark.parametrize(("wait", "sentence"), [
    (lambda nll: nll.item(), r"item\(\) cannot be called on meta"),
    (lambda nll: nll.nonzero(), r"nonzero\(\) raises unimplemented"),
    (lambda nll: nll + torch.ones(2), "not on the expected device meta"),
], ids=["a number read", "a length found", "a tensor of the host's"])  # fmt: skip
def test_a_wait_raises(wait, sentence, data, tmp_path, valueless):
    trainer = add_to_losses(Trainer(tiny_config(data.config), tmp_path, data), wait)
    with pytest.raises(RuntimeError, match=sentence):
        trainer.take_step()


def test_a_copy_that_is_waited_for_is_seen(data, tmp_path, valueless):
    trainer = add_to_losses(Trainer(tiny_config(data.config), tmp_path, data), torch.Tensor.cpu)
    with Crossings() as crossings:
        trainer.take_step()
    assert crossings.seen == [*BATCH, ("cpu", 0, False), *NUMBERS]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "router_bias_update_rate": 0.01}])
def test_a_step_on_a_gpu_waits_for_nothing(changes, data, tmp_path):
    trainer = Trainer(tiny_config(data.config, device="cuda", dtype="bfloat16", head_dim=16, **changes), tmp_path, data)
    trainer.read_step(trainer.take_step())  # compiles its kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = trainer.take_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(trainer.read_step(step)["loss"])


def test_a_run_that_reads_behind_is_the_same_run(data, whole, tmp_path):
    taken, read = [], []
    with fresh_process():
        trainer = behind(Trainer(tiny_config(data.config, **EVERYTHING), tmp_path, data))
        take, tell = trainer.take_step, trainer.read_step
        trainer.take_step = lambda: taken.append(take()) or taken[-1]
        trainer.read_step = lambda step: read.append(len(taken) - step.number) or tell(step)
        assert trainer.run()
    assert_same_outcome(tmp_path, whole(**EVERYTHING)[0])
    assert set(read) == {0, 1}  # at once where the model is evaluated or saved


def test_a_stop_leaves_no_step_unread(data, whole, tmp_path):
    with fresh_process():
        trainer = behind(Trainer(tiny_config(data.config), tmp_path, data))
        take = trainer.take_step
        trainer.take_step = lambda: setattr(trainer, "stop_requested", trainer.step == 6) or take()
        assert not trainer.run()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 7
    with fresh_process():
        assert behind(Trainer(tiny_config(data.config), tmp_path, data)).run()
    assert_same_outcome(tmp_path, whole()[0])


@pytest.mark.parametrize(("step", "begun"), [(9, 10), (12, 12)])
@pytest.mark.parametrize("spoil", [lambda *at: spoil_gradient(at[0], math.nan, at[1]), spoil_loss])
def test_what_is_not_finite_is_never_saved(spoil, step, begun, data, whole, tmp_path):
    trainer = behind(Trainer(tiny_config(data.config), tmp_path, data))
    spoil(trainer, step)
    with pytest.raises(NotFinite, match=rf"^step {step}: .*newest checkpoint is of step 6"):
        trainer.run()
    assert trainer.step == begun
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step - 1
    assert checkpoints(tmp_path)[-1].name == "step-000006"
    with fresh_process():
        assert Trainer(tiny_config(data.config), tmp_path, data).run()
    assert_same_outcome(tmp_path, whole()[0])


def test_speed_is_that_from_read_to_read(data, tmp_path, monkeypatch):
    trainer = behind(Trainer(tiny_config(data.config), tmp_path, data))
    times = iter([10.0, 10.5, 12.0, 14.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(times))
    steps = [trainer.take_step(), trainer.take_step()]
    speeds = [trainer.read_step(step)["tokens_per_s"] for step in steps]
    assert speeds == [steps[0].tokens / 2.0, steps[1].tokens / 2.0]


def test_a_batch_goes_to_a_gpu_through_pinned_memory(monkeypatch):
    batch, seen = Batch(*[torch.zeros(2, 3, dtype=torch.int64)] * 4, num_targets=6, num_bytes=6), []
    assert batch.to("cpu").tokens is batch.tokens
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: seen.append((*where, how)) or tensor)
    batch.to("cuda:0")
    assert seen == ["pinned"] * 4 + [("cuda:0", {"non_blocking": True})] * 4
