"""The learning rate at the corners of a run, counted in steps or as a share of it."""

from itertools import pairwise

import pytest
from tiny_run import tiny_config

from moe_lm.config import TrainConfig
from moe_lm.train import Trainer
from moe_lm.train.schedule import learning_rate, learning_rate_at

pytestmark = pytest.mark.usefixtures("one_process")

WSD = TrainConfig(
    steps=100, learning_rate=2.0, warmup=0.1, decay="wsd", decay_share=0.16, min_learning_rate_ratio=0.5
)  # fmt: skip
"""Steps 1 to 10 warm up, 11 to 84 are at the peak, 85 to 100 decay."""


@pytest.mark.parametrize(
    ("step", "rate"),
    [(1, 0.2), (10, 2.0), (11, 2.0), (84, 2.0), (85, 1.0 + 0.75), (88, 1.0 + 0.5), (93, 1.0 + 0.25), (100, 1.0)],
)
def test_wsd_at_its_corners(step, rate):
    """One sixteenth into the decay 1 - sqrt has lost a quarter of the way to the floor, one quarter in a half."""
    assert learning_rate(WSD, step) == pytest.approx(rate, rel=1e-12)


def test_wsd_warms_up_stays_and_falls():
    rates = [learning_rate(WSD, step) for step in range(1, 101)]
    assert set(rates[9:84]) == {2.0}
    assert all(after > before for before, after in pairwise(rates[:10]))
    falls = [before - after for before, after in pairwise(rates[83:])]
    assert all(after < before for before, after in pairwise(falls)), "1 - sqrt falls ever more slowly"


def test_wsd_may_be_all_decay():
    config = TrainConfig(steps=4, learning_rate=1.0, warmup=0.0, decay="wsd", decay_share=1.0,
                         min_learning_rate_ratio=0.0)  # fmt: skip
    assert [learning_rate(config, step) for step in (1, 4)] == [0.5, 0.0]


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_the_share_of_a_run_says_the_same_as_its_steps(decay):
    """Up to the one step that cosine and line stay at the peak."""
    steps = 10_000
    config = TrainConfig(steps=steps, learning_rate=1.0, warmup=0.1, decay=decay, decay_share=0.3,
                         min_learning_rate_ratio=0.05)  # fmt: skip
    for step in (1, 500, 999, 1000, 1001, 5000, 6999, 7000, 7100, 9000, steps):
        assert learning_rate_at(config, step / steps) == pytest.approx(learning_rate(config, step), abs=2e-3), step
    assert learning_rate_at(config, 0.05) == 0.5
    assert learning_rate_at(config, 1.0) == 0.05
    assert learning_rate_at(TrainConfig(warmup=0.0, learning_rate=1.0, decay=decay), 0.0) == 1.0


def test_a_step_takes_the_rate_of_its_share(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, warmup=0.5, embedding_learning_rate_ratio=3.0), tmp_path, data)
    assert trainer.train_step(0.25)["learning_rate"] == trainer.config.train.learning_rate / 2
    assert {group["lr"] / group["lr_ratio"] for group in trainer.optimizer.param_groups} == {5e-3}
    assert trainer.train_step()["learning_rate"] == learning_rate(trainer.config.train, 2)
