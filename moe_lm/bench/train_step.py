"""Optimizer steps as the training loop takes them: its own, over random tokens in place of a data set.

B rows of T tokens.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from moe_lm.bench import machine
from moe_lm.config import RunConfig
from moe_lm.data.packing import Batch
from moe_lm.train.loop import Trainer


class RandomRows:
    """Stands where prepared data stands: rows of random tokens, each one document, the same batch every step."""

    def __init__(self, vocab_size: int, rows: int, length: int):
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (rows, length + 1), generator=draw)
        positions = torch.arange(length).expand(rows, length)
        self.batch = Batch(
            tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, torch.zeros_like(positions),
            num_targets=rows * length, num_bytes=rows * length,
        )  # fmt: skip

    def train_loader(self, seed: int, sequence_length: int) -> "RandomRows":
        return self

    def next_batch(self, rows: int) -> Batch:
        assert rows == len(self.batch.tokens), "the whole batch is one micro-batch"
        return self.batch


class TrainingStep:
    """Steps of `moe_lm.train.loop.Trainer` on rows of `data.sequence_length` that make up `train.batch_tokens`.

    They go through the model at once, and a draft learns from the text alone. `dtype` names that of the activations.
    """

    def __init__(self, run: RunConfig):
        length = run.data.sequence_length
        rows = self.rows = max(1, run.train.batch_tokens // length)
        train = replace(
            run.train, batch_tokens=rows * length, micro_batch_tokens=rows * length, batch_tokens_start=None,
            batch_ramp_steps=0, distillation=0.0,
        )  # fmt: skip
        self.run = replace(run, train=train)
        self.data = RandomRows(run.model.vocab_size, rows, length)
        with tempfile.TemporaryDirectory(prefix="moe_lm-bench-") as empty:  # nothing to resume
            self.trainer = Trainer(self.run, Path(empty), self.data)
        self.device, self.model = self.trainer.device, self.trainer.model.train()
        self.dtype = str(self.trainer.dtype).removeprefix("torch.")
        for _ in range(3):
            self.step()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.data.batch.tokens.numel()

    def planned(self, run: RunConfig) -> RunConfig:
        """The run on one device, its batch in one forward."""
        plan = replace(run.plan, dtype=self.dtype, micro_batch=self.rows, gpus=1, tp=1, pp=1, ep=1)
        return replace(run, plan=plan)

    def step(self) -> None:
        """Take one, and read metrics as a run does: on a GPU those of the step before."""
        self.trainer.unread.append(self.trainer.take_step())
        for step in self.trainer.to_read():
            self.trainer.read_step(step)

    def __call__(self, steps: int = 3) -> float:
        """Tokens per second of a few steps."""
        return tokens_per_second(self, steps)


def tokens_per_second(contender, steps: int) -> float:
    """Of `steps` calls of `contender.step`, `contender.tokens` each, on `contender.device`."""
    machine.synchronize(contender.device)
    start = time.perf_counter()
    for _ in range(steps):
        contender.step()
    machine.synchronize(contender.device)
    return steps * contender.tokens / (time.perf_counter() - start)
