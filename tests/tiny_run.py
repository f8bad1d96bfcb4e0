"""A run that takes a second: a config of thousands of parameters on text made of a few words."""

import contextlib
import dataclasses
import functools
import io
import json
import random
from pathlib import Path

import pytest
import torch

from moe_lm.bench import machine
from moe_lm.checkpoint.directory import checkpoints
from moe_lm.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, SampleConfig, SourceConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, num_local_experts=4,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=20, batch_tokens=256, micro_batch_tokens=256, learning_rate=1e-2, dtype="float32", device="cpu",
    eval_every=6, eval_tokens=256,
)  # fmt: skip
EVERYTHING = {
    "micro_batch_tokens": 96, "batch_tokens_start": 64, "batch_ramp_steps": 12, "router_jitter_noise": 0.1,
    "log_every": 2, "dtype": "bfloat16", "optimizer": "muon", "expert_muon_every": 2,
}  # fmt: skip
"""Settings under which a resume has most to get right: micro-batches, a ramp, random numbers, steps without a line,
two rules of update, one of them with steps left out."""
MEASURED = ("tokens_per_s", "mfu")
"""What differs from run to run in a line of metrics.jsonl."""


def write_corpus(root: Path) -> DataConfig:
    """Two directories of short files, and the config that reads them."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "mü") for b in ("n", "ra", "st")]
    for name, files in (("left", 60), ("right", 40)):
        (root / name).mkdir(parents=True)
        for i in range(files):
            text = " ".join(draw.choices(words, weights=range(1, len(words) + 1), k=draw.randrange(20, 80)))
            (root / name / f"{i}.txt").write_text(text, "utf-8")
    sources = (SourceConfig(str(root / "left"), epochs=2.0), SourceConfig(str(root / "right"), epochs=4.0))
    return DataConfig(sources, sequence_length=32, validation_fraction=0.2, cache_dir=str(root / "cache"))


def tiny_config(data: DataConfig, every: int = 6, keep: int = 2, draft: str | None = None, **changes) -> RunConfig:
    """The tiny run with some of its settings changed: fields of `model` and `train` by name."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model = {name: value for name, value in changes.items() if name in names}
    train = {name: value for name, value in changes.items() if name not in names}
    return RunConfig(
        draft=draft,
        model=dataclasses.replace(MODEL, **model),
        data=data,
        train=dataclasses.replace(TRAIN, **train),
        checkpoint=CheckpointConfig(every=every, keep=keep),
        sample=SampleConfig(prompts=("ban dora",), max_tokens=6, draft_tokens=2),
    )


def outcome(run_dir: Path) -> dict[str, object]:
    """All that a run leaves and that must not depend on where it was interrupted."""
    newest = checkpoints(run_dir)[-1]
    progress = json.loads((newest / "train_state" / "progress.json").read_text("utf-8"))
    assert progress.pop("seconds") > 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "checkpoint": newest.name,
        "weights": (newest / "model.safetensors").read_bytes(),
        "optimizer and random numbers": (newest / "train_state" / "state.safetensors").read_bytes(),
        "progress": progress,
        "lines": [{key: value for key, value in line.items() if key not in MEASURED} for line in lines],
    }


def assert_same_outcome(here: Path, there: Path) -> None:
    first, second = outcome(here), outcome(there)
    assert first["lines"] == second["lines"]
    for name, value in first.items():
        assert value == second[name], name


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


def at_step(trainer, step, act):
    """Have `act` called at the end of that step, before anything of it is logged or saved."""
    take = trainer.take_step

    def take_step():
        result = take()
        if trainer.step == step:
            act()
        return result

    trainer.take_step = take_step
    return trainer


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Terminal(io.StringIO):
    def isatty(self):
        return True
