"""The training loop. A step reads: fetch, forward, backward, norm, check, clipped step; then it is recorded."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_lm.bench import machine
from moe_lm.checkpoint.directory import checkpoints, publish, step_of
from moe_lm.checkpoint.hf import load_state, save_hf
from moe_lm.checkpoint.train_state import load_train_state, save_train_state
from moe_lm.config import RunConfig, require
from moe_lm.data import PreparedData
from moe_lm.model import Transformer
from moe_lm.model.device import choose_device
from moe_lm.scaling.counts import forward_flops_per_token, train_flops_per_token
from moe_lm.train.distillation import check_distillation, distillation_losses
from moe_lm.train.evaluate import Evaluation, evaluate
from moe_lm.train.metrics import MetricsLog, ProgressLine
from moe_lm.train.optim import gradient_norm, make_optimizer
from moe_lm.train.schedule import batch_rows, learning_rate, learning_rate_at
from moe_lm.train.starvation import StarvationWatch
from moe_lm.train.step import Step, read_losses
from moe_lm.train.upcycle import upcycle


class NotFinite(RuntimeError):
    """A loss or gradient is infinite or not a number. The step was not taken; if evaluating, it was not saved."""


class Trainer:
    """One run of one model: builds it, or takes it up from its newest checkpoint, and trains it to the end."""

    def __init__(self, config: RunConfig, run_dir: Path, data: PreparedData, target: Transformer | None = None):
        """`target` is the model that a draft is distilled from; it is put in evaluation mode, and needed only then.

        Raises ConfigError for settings that fit neither it, nor the data, the device or the newest checkpoint.
        """
        check_distillation(config, target.config if target is not None else None)
        self.config, self.run_dir, self.data = config, run_dir, data
        self.target = target.eval() if config.train.distillation else None
        self.device = choose_device(config.train.device)
        self.dtype = choose_dtype(config.train.dtype, self.device)
        # Measured before the seed counts: it draws random numbers, which a resumed run would draw at another step.
        self.gemm_rate = machine.gemm_rate(self.device, self.dtype)
        torch.manual_seed(config.train.seed)
        model = Transformer(config.model, self.dtype, checkpoint_blocks=config.train.activation_checkpointing)
        self.model = model.reset_parameters(zero_residual=config.train.zero_init_residual).to(self.device)
        self.optimizer = make_optimizer(self.model, config.train, self.dtype)
        length = config.data.sequence_length
        self.loader = data.train_loader(config.train.seed, length)
        self.flops_per_token = train_flops_per_token(config.model, length)
        if self.target is not None:
            self.flops_per_token += forward_flops_per_token(self.target.config, (length + 1) / 2)
        self.step = self.tokens = 0
        self.seconds = 0.0
        """Wall-clock of the run; of what was done before a resume, that up to the checkpoint."""
        self.evaluation: Evaluation | None = None
        """That of the weights as they are, None where these have not been evaluated."""
        self.starvation = StarvationWatch(config.train.starving_steps)
        self.stop_requested = False
        self.behind = 0 if self.device.type == "cpu" else 1
        """Steps of a run that are begun before the metrics of one are read: a GPU then always has work."""
        self.unread: list[Step] = []
        self.read_at = 0.0
        """time.perf_counter() when metrics were last read."""
        self.resume()

    def resume(self) -> None:
        """Take up the newest complete checkpoint, if there is one; else the dense model that the run starts from."""
        found = checkpoints(self.run_dir)
        if not found:
            if self.config.train.upcycle is not None:
                upcycle(self.model, self.config.train.upcycle)
            return
        load_state(found[-1], self.model)
        progress = load_train_state(found[-1], self.model, self.optimizer)
        here, saved = self.config.train.optimizer, progress["optimizer"]
        require(here == saved, f"train.optimizer = {here} is not the {saved} of the saved run: resume with that.")
        self.loader.load_state_dict(progress["loader"])
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]
        self.optimizer.steps = self.step
        if "starvation" in progress:  # which checkpoints of older versions lack
            self.starvation.load_state(progress["starvation"])
        if progress["evaluation"] is not None:
            self.evaluation = Evaluation(**progress["evaluation"])

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def run(self) -> bool:
        """Train to the last step, or until SIGINT or SIGTERM ask to stop; False when they did.

        Either way the end is saved. Raises NotFinite, leaving the last good checkpoint the newest.
        """
        begun = time.monotonic() - self.seconds
        config = self.config
        log = MetricsLog(self.run_dir, self.step, config.train.tensorboard)
        line = ProgressLine(config.train.steps, self.step)
        self.model.train()
        try:
            with self.signals():
                while not self.finished and not self.stop_requested:
                    self.unread.append(self.take_step())
                    wanted = self.due(config.train.eval_every) or self.due(config.checkpoint.every)
                    for step in self.to_read(everything=wanted):
                        self.record(step, log, line)
                    self.seconds = time.monotonic() - begun
                    if self.due(config.checkpoint.every):
                        self.save()
                for step in self.to_read(everything=True):
                    self.record(step, log, line)
                if self.finished and self.evaluation is None:  # the end was moved to a step that is already done
                    self.evaluate()
                self.save()  # which does nothing where that is done
        finally:
            line.close()
            log.close()
        return not self.stop_requested

    def to_read(self, everything: bool = False) -> Iterator[Step]:
        """Take the steps that are to be read now from `unread`, oldest first: all, or all but the last `behind`."""
        while len(self.unread) > (0 if everything else self.behind):
            yield self.unread.pop(0)

    def record(self, step: Step, log: MetricsLog, line: ProgressLine) -> None:
        """Read a step's metrics, say what they say, and evaluate the model where that is due after it."""
        config, last = self.config.train, self.finished or self.stop_requested
        metrics = self.read_step(step)
        for starved in self.starvation.update(step.number, metrics["expert_load"]):
            line.note(f"warning: {starved}")
        if self.due(config.eval_every, step.number):
            metrics |= self.evaluate()
            line.note(evaluation_text(step.number, self.evaluation))
        if self.due(config.log_every, step.number):
            log.write(metrics | self.starvation.log())
        line.show(metrics, last=last and step.number == self.step)

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether what is done every so many steps is due after `step`, the one that was begun last if not told."""
        step = self.step if step is None else step
        return step % every == 0 or step >= self.config.train.steps

    def train_step(self, done: float | None = None) -> dict[str, Any]:
        """One optimizer step over one batch, and its metrics, as take_step and read_step have them."""
        return self.read_step(self.take_step(done))

    def take_step(self, done: float | None = None) -> Step:
        """Begin one optimizer step over one batch. Where metrics are read behind, nothing here waits for the device.

        `done` is the share of the run that is over after this step, where the run is not counted in `train.steps`.
        Where metrics are not read behind, a step that is not finite raises NotFinite and is not taken.
        """
        start = time.perf_counter()
        train = self.config.train
        rate = learning_rate(train, self.step + 1) if done is None else learning_rate_at(train, done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        batches = self.micro_batches()
        num_targets = sum(batch.num_targets for batch in batches)
        parts = []
        for batch in batches:
            batch = batch.to(self.device)
            if self.target is None:
                losses = self.model.losses(batch.tokens, batch.targets, batch.positions, batch.documents)
                objective = losses.nll
            else:
                losses = distillation_losses(self.model, self.target, batch, train.distillation)
                objective = losses.total
            # Router losses are means over a micro-batch: each counts by its share of the rows.
            share = batch.tokens.shape[0] / sum(len(b.tokens) for b in batches)
            loss = objective / num_targets + share * losses.router_loss(self.config.model)
            loss.backward()
            parts.append((share, losses))
        weights = self.model.parameters()
        grad_norm = gradient_norm([weight.grad for weight in weights if weight.grad is not None])
        tokens = sum(batch.tokens.numel() for batch in batches)
        numbers = read_losses(parts, grad_norm, self.model.router_biases)  # as they were for the step
        num_bytes = sum(batch.num_bytes for batch in batches)
        step = Step(self.step + 1, self.tokens + tokens, tokens, num_targets, num_bytes, rate, start, numbers)
        if not self.behind:
            self.check_step(step)
        self.optimizer.step((grad_norm / train.max_grad_norm).clamp_min(1) if train.max_grad_norm else None)
        self.optimizer.zero_grad()
        if self.config.model.router_bias_update_rate:
            self.model.update_router_biases(sum(losses.expert_counts for _, losses in parts))
        self.step, self.tokens, self.evaluation = step.number, step.all_tokens, None
        return step

    def read_step(self, step: Step) -> dict[str, Any]:
        """Its metrics; waits for it. Raises NotFinite where it is not: the weights are then spoiled, and not saved."""
        self.check_step(step)
        now = time.perf_counter()
        speed = step.tokens / (now - max(step.begun, self.read_at))
        self.read_at = now
        return {
            "step": step.number,
            "tokens": step.all_tokens,
            **step.metrics,
            "learning_rate": step.learning_rate,
            "tokens_per_s": speed,
            "mfu": speed * self.flops_per_token / self.gemm_rate,
        }

    def check_step(self, step: Step) -> None:
        self.check_finite(step.number, step.metrics, "loss", "aux_loss", "z_loss", "grad_norm")

    def micro_batches(self) -> list:
        length = self.config.data.sequence_length
        left = batch_rows(self.config.train, length, self.step + 1)
        most = max(1, self.config.train.micro_batch_tokens // length)
        batches = []
        while left:
            rows = min(left, most)
            batches.append(self.loader.next_batch(rows))
            left -= rows
        return batches

    def check_finite(self, step: int, metrics: dict[str, Any], *names: str) -> None:
        for name in names:
            if not math.isfinite(metrics[name]):
                saved = checkpoints(self.run_dir)
                newest = f"its newest checkpoint is of step {step_of(saved[-1])}" if saved else "it has no checkpoint"
                train = self.config.train
                muon = f" or a train.muon_learning_rate below {train.muon_learning_rate}"
                raise NotFinite(
                    f"step {step}: {name} = {metrics[name]}, so {self.run_dir} stops and {newest}: go on with a "
                    f"train.learning_rate below {train.learning_rate}{muon if train.optimizer == 'muon' else ''}."
                )

    def evaluate(self) -> dict[str, Any]:
        tokens = self.config.train.eval_tokens * (4 if self.finished else 1)
        self.evaluation = evaluate(self.model, self.data, self.config, tokens)
        metrics = {
            "val_bits_per_byte": self.evaluation.bits_per_byte,
            "val_bits_per_byte_by_source": self.evaluation.by_source,
            "val_dead_experts": self.evaluation.dead_experts,
        }
        self.check_finite(self.step, metrics, "val_bits_per_byte")
        return metrics

    def save(self) -> Path:
        def write(directory: Path) -> None:
            save_hf(directory, self.model, self.data.tokenizer)
            progress = {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "optimizer": self.config.train.optimizer,
                "loader": self.loader.state_dict(),
                "starvation": self.starvation.state(),
                "evaluation": vars(self.evaluation) if self.evaluation else None,
            }
            save_train_state(directory, self.model, self.optimizer, progress)

        return publish(self.run_dir, self.step, write, self.config.checkpoint.keep)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside the block the first SIGINT or SIGTERM asks for a stop after the step; a second acts as ever."""

        def ask(number: int, frame: object) -> None:
            self.stop_requested = True
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def evaluation_text(step: int, evaluation: Evaluation) -> str:
    parts = ", ".join(f"{name} {value:.3f}" for name, value in evaluation.by_source.items())
    return f"step {step}: held-out bits per byte {evaluation.bits_per_byte:.3f} ({parts})"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    return machine.fastest_dtype(device) if name == "auto" else getattr(torch, name)
