"""The sheet of this machine: what is measured, that it is kept, and the benchmark that predicts and measures."""

import dataclasses
import re
from dataclasses import replace

import pytest
import torch
from tiny_run import tiny_config, write_corpus

from moe_lm.bench import forecast, machine
from moe_lm.cli import parse_run_config
from moe_lm.config import ConfigError
from moe_lm.scaling import measure
from moe_lm.scaling.__main__ import main
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.hardware import load_hardware, machine_of, read_sheet
from moe_lm.scaling.hardware import machine as machine_named
from moe_lm.scaling.layout import settle
from moe_lm.scaling.measure import measured_machine
from moe_lm.scaling.optimizers import orthogonalisation_flops
from moe_lm.scaling.serving import modern_engine
from moe_lm.scaling.training import step_time

RATES = {
    "gemm_rate": lambda device, dtype: 4e11 if dtype == torch.bfloat16 else 1e11,
    "product_rate": lambda device, dtype: 1e11, "elementwise_bandwidth": lambda device, dtype: 5e9,
    "read_bandwidth": lambda device: 1.5e10, "cached_bandwidth": lambda device, nbytes: 6e10,
    "call_seconds": lambda device: 4e-6,
}  # fmt: skip
OURS = {
    "attention_rate": lambda dtype: 2e10, "experts_rate": lambda dtype, passing: 5e10,
    "loss_bandwidth": lambda dtype, products: 3e9, "decoder_rate": lambda: 2e11, "last_cache": lambda: 1 << 25,
}  # fmt: skip


@pytest.fixture
def rates(monkeypatch):
    """A machine whose rates are known."""
    for name, rate in RATES.items():
        monkeypatch.setattr(machine, name, rate)
    for name, rate in OURS.items():
        monkeypatch.setattr(measure, name, rate)
    monkeypatch.setattr(machine, "forget", lambda: None)


@pytest.mark.usefixtures("rates")
def test_a_sheet_holds_what_was_measured_and_is_kept(tmp_path):
    path = tmp_path / "here.toml"
    found = measured_machine(str(path))
    assert (found.sheet.peak_flops.bfloat16, found.sheet.peak_flops.float32) == (4e11, 2e11)
    assert (found.sheet.bandwidth, found.sheet.units) == (1.5e10, torch.get_num_threads())
    assert found.reached.gemm == pytest.approx(0.25)
    assert found.reached.passes == pytest.approx(3)
    assert found.reached.launch == 4e-6
    assert (found.reached.attention, found.reached.grouped) == pytest.approx((0.05, 0.5))
    assert (found.reached.loss, found.reached.cached) == pytest.approx((5, 4))
    assert found.sheet.memory > 1 << 30
    kept = machine_named(path)
    assert kept.reached._asdict() == pytest.approx(found.reached._asdict(), rel=1e-3)
    assert dataclasses.replace(load_hardware(path), measured=None) == dataclasses.replace(found.sheet, measured=None)
    assert all("--measure" in source for source in read_sheet(path)[1].values())
    assert machine_of(kept.sheet) == kept


@pytest.mark.usefixtures("rates")
def test_a_plan_for_this_machine(tmp_path, capsys):
    assert main(["nano", "--gpu", "cpu", "--measure", str(tmp_path / "here.toml")]) is None
    first = capsys.readouterr().out
    assert main(["nano", "--gpu", str(tmp_path / "here.toml")]) is None
    second = capsys.readouterr().out
    assert first.startswith("nano: 7.32M parameters")
    assert [line for line in first.splitlines() if "tokens/s, MFU" in line] == [
        line for line in second.splitlines() if "tokens/s, MFU" in line
    ]
    assert re.search(r"^cost +\$0 ", first, re.MULTILINE)


@pytest.mark.usefixtures("rates")
def test_a_sheet_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"there/x\.toml cannot be written: No such file or directory\."):
        measured_machine(str(tmp_path / "there" / "x.toml"))


def test_the_real_rates_are_rates(monkeypatch):
    monkeypatch.setattr(machine, "best_seconds", lambda run, device: machine.median_seconds(run, device, 0.001))
    machine.forget()
    device, dtype = torch.device("cpu"), torch.bfloat16
    assert machine.product_rate(device, dtype) > 1e8
    assert measure.attention_rate(dtype) > 1e7
    assert 1e7 < measure.experts_rate(dtype, 1e10) < 1e13
    assert 1e6 < measure.loss_bandwidth(dtype, 1e11) < 1e12
    assert 1e8 < measure.decoder_rate() < 1e14
    assert 1e8 < machine.cached_bandwidth(device, 1 << 20) < 1e13
    assert 1e7 < machine.elementwise_bandwidth(device, dtype) < 1e12
    assert 1e-8 < machine.call_seconds(device) < 1e-2
    machine.forget()
    assert machine.product_rate.cache_info().currsize == 0


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize("experts", [0, 4])
def test_forecast_measures_what_it_predicts(experts, tmp_path):
    run = tiny_config(write_corpus(tmp_path), steps=6, num_local_experts=experts, max_position_embeddings=256)
    rows = forecast.compare(run, 1)
    assert [row["what"] for row in rows] == ["training", "decode, batch 1", "decode, batch 16"]
    for row in rows:
        assert row["predicted"] > 0
        assert row["measured"] > 0
        assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"])


@pytest.mark.usefixtures("rates")
def test_a_model_that_the_last_cache_holds_is_read_from_it():
    here = measured_machine()
    assert here.reading(1 << 23).reached.bandwidth == pytest.approx(4)
    # 12 of 64 MiB stay, so 52 cross the bus.
    assert here.reading(1 << 26).reached.bandwidth == pytest.approx(1 / (12 / 64 / 4 + 52 / 64))
    gpu = machine_named("h100")
    assert gpu.reading(1 << 20) is gpu


@pytest.mark.usefixtures("rates")
def test_a_processors_host_works_in_calls():
    here = measured_machine()
    slow = machine_of(dataclasses.replace(here.sheet, measured=dataclasses.replace(here.sheet.measured, launch=8e-6)))
    assert modern_engine(slow).step == pytest.approx(2 * modern_engine(here).step)
    assert modern_engine(slow).sequence == pytest.approx(2 * modern_engine(here).sequence)


@pytest.mark.usefixtures("rates")
def test_a_processors_trainer_rounds_its_weights_in_every_step():
    """12 bytes of each weight at the rate of passes, 5e9 a second; float32 needs no rounding."""
    run = parse_run_config(["configs/nano.toml"], "")[0]
    here, weights = measured_machine(), parameters(run.model).total
    plan = replace(run.plan, micro_batch=8)
    in_halves, whole = (
        step_time(run.model, settle(replace(run, plan=replace(plan, dtype=dtype))), here).parts["optimizer"]
        for dtype in ("bfloat16", "float32")
    )
    products = 4e11 * found_rate(here), 2e11 * found_rate(here)
    steps = run.train.expert_ns_steps / run.train.expert_muon_every
    orthogonal = sum(orthogonalisation_flops(run.model, layer, steps) for layer in range(3))
    in_halves -= orthogonal / products[0]
    whole -= orthogonal / products[1]
    assert in_halves - whole == pytest.approx(12 * weights / 5e9, rel=0.01)


def found_rate(here):
    """Share of the peak that small products side by side reach."""
    return here.reached.gemm * here.reached.grouped
