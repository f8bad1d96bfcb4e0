import functools

import pytest
import torch
from tiny_run import fresh_process, tiny_config, write_corpus

from moe_lm.data import prepare_data
from moe_lm.train import Trainer
from moe_lm.train.metrics import read_metrics


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def data(corpus):
    return prepare_data(corpus, 300)


@pytest.fixture(scope="session")
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


@pytest.fixture
def one_process():
    with fresh_process():
        yield
