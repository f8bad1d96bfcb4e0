"""Fixtures of several files. What costs an import of torch is imported where it is used: the house rules of
test_architecture.py read sources only, and hold where nothing is installed."""

import dataclasses
import functools
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

# Read when OpenMP is loaded. Two processes share the cores, and a thread that spins at the end of a parallel loop takes
# the other's time: seven files of tests took 117 s on two cores, and 79 where threads sleep at once.
os.environ.setdefault("GOMP_SPINCOUNT", "0")


@pytest.fixture(autouse=True)
def _same_start():
    if importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(0)


@pytest.fixture(params=["native", "portable", "batched"])
def products(request, monkeypatch):
    """Which products a training on a CPU runs on, whatever this machine would choose: of pairs, of pairs without what
    only some CPUs can do, or oneDNN's."""
    from kernels.cpu import pairs

    monkeypatch.setattr(pairs, "fastest", lambda: request.param != "batched")
    if request.param == "portable":
        monkeypatch.setattr(pairs, "load", functools.partial(pairs.load, generic=True))
    return request.param


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from tiny_run import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def data(corpus):
    from moe_lm.data import prepare_data

    return prepare_data(corpus, 300)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A function from settings to the directory of an uninterrupted run with them, its trainer and its lines."""
    from tiny_run import fresh_process, tiny_config

    from moe_lm.train import Trainer
    from moe_lm.train.metrics import read_metrics

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
    from tiny_run import fresh_process

    with fresh_process():
        yield


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(scope="module")
def one_thread():
    """Products this small take longer to hand out than to compute, several times so on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    from hub_models import TEXTS

    from moe_lm.data.tokenizer import train_tokenizer

    return train_tokenizer(TEXTS * 2, 260)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A directory with a saved model of every family."""
    from hub_models import SMALL, random_model

    from moe_lm.checkpoint import save_hf

    directory = tmp_path_factory.mktemp("saved")
    for name, config in SMALL.items():
        (directory / name).mkdir()
        save_hf(directory / name, random_model(config), tokenizer)
    (directory / "mistral").mkdir()
    save_hf(
        directory / "mistral", random_model(dataclasses.replace(SMALL["dense"], hidden_size=34, head_dim=8)), tokenizer
    )
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    def make(name: str) -> Path:
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return make


@pytest.fixture(scope="module")
def server_url(tokenizer, tmp_path_factory):
    """The address of a running server whose model, if greedy, writes ASCII, and long enough to be stopped."""
    from serving import live, toy_engine

    with live(toy_engine(tokenizer, ascii_only=True, context=4096), tmp_path_factory.mktemp("model")) as server:
        yield server.url
