import dataclasses
import json
import math
import random

import pytest

from moe_lm.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainConfig
from moe_lm.scaling.counts import train_flops_per_token
from moe_lm.scaling.laws import GPT4_FLOPS, Law, Point, extrapolations, fit, law_table, read_run, read_runs, to_json
from moe_lm.toml import to_toml

TRUE = Law(floor=0.8, scale=0.9, exponent=0.15, unit=1e15)
COMPUTES = [1e14, 2e14, 4e14, 8e14, 1.6e15, 3e15, 6e15, 1.2e16]


def points(noise: float, seed: int = 0, computes=COMPUTES) -> list[Point]:
    draw = random.Random(seed)
    return [Point(f"run{i}", c, TRUE.loss(c) * math.exp(draw.gauss(0, noise))) for i, c in enumerate(computes)]


def test_a_law_without_noise_is_found_again():
    found = fit(points(0), draws=2)
    assert found.law.floor == pytest.approx(TRUE.floor, rel=1e-3)
    assert found.law.exponent == pytest.approx(TRUE.exponent, rel=1e-3)
    assert found.law.loss(1e20) == pytest.approx(TRUE.loss(1e20), rel=1e-3)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """80% by construction; 6 of 8 seeds leave it room, and an interval of no width would hold none."""
    inside = 0
    for seed in range(8):
        low, high = fit(points(0.004, seed), draws=60).interval(1.2e17)
        inside += low <= TRUE.loss(1.2e17) <= high
    assert inside >= 5
    assert high - low > 0.005


def test_uncertainty_grows_beyond_the_runs():
    found = fit(points(0.004), draws=60)
    widths = [row["high"] - row["low"] for row in extrapolations(found)]
    assert widths == sorted(widths)
    assert widths[-1] > 5 * widths[0]


def test_an_outlier_weighs_little():
    """Huber loss: one run that went wrong does not bend the law (Hoffmann et al. 2022, section 3.3)."""
    runs = points(0, computes=[1e14 * 2**i for i in range(9)])
    runs[4] = dataclasses.replace(runs[4], loss=runs[4].loss * 1.05)
    assert fit(runs, draws=1).law.loss(1e18) == pytest.approx(TRUE.loss(1e18), rel=0.01)


def test_the_same_runs_give_the_same_intervals():
    assert fit(points(0.004), draws=20) == fit(points(0.004), draws=20)


def test_too_few_computes_are_refused():
    with pytest.raises(ConfigError, match="at least 4 distinct computes: these have 3"):
        fit([*points(0)[:3], points(0.01)[0]])


def test_extrapolations_name_what_was_fitted():
    found = fit(points(0.004), draws=60)
    rows = extrapolations(found)
    assert [row["times"] for row in rows[:3]] == pytest.approx([1, 10, 100])
    assert [row["beyond"] for row in rows[:3]] == [False, False, True]
    assert rows[-1]["flops"] == GPT4_FLOPS
    text = law_table(found)
    assert text.count("1.00e+14 to 1.20e+16") == len(rows)
    assert text.count("beyond: not a prediction") == sum(row["beyond"] for row in rows)
    assert json.loads(json.dumps(to_json(found)))["fitted_range_flops"] == [1e14, 1.2e16]


def write_run(directory, *, steps=10, stopped=10, loss=1.5, fraction=0.05):
    directory.mkdir()
    config = RunConfig(
        model=ModelConfig(), data=DataConfig(validation_fraction=fraction), train=TrainConfig(steps=steps)
    )
    (directory / "config.toml").write_text(to_toml(config))
    lines = [{"step": n, "tokens": 100 * n, "val_bits_per_byte": 9.0 - n} for n in range(1, stopped)]
    lines.append({"step": stopped, "tokens": 100 * stopped, "val_bits_per_byte": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_run_gives_its_last_evaluation(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.loss == 1.5
    assert run.flops == pytest.approx(1000 * train_flops_per_token(ModelConfig(), DataConfig().sequence_length))


def test_an_unfinished_run_is_no_point(tmp_path):
    with pytest.raises(ConfigError, match="stopped at step 7 of 10"):
        read_run(write_run(tmp_path / "run", stopped=7))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ConfigError, match="no whole metrics"):
        read_run(tmp_path / "run")


def test_losses_of_different_text_do_not_compare(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", fraction=0.1)]
    with pytest.raises(ConfigError, match="hold out different text"):
        read_runs(runs)
    assert len(read_runs(runs[:1])) == 1
