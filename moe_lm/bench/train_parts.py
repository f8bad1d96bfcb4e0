"""Where the time of an optimizer step goes, by a clock that always runs for exactly one part.

Entering and leaving a module switches the clock in the forward. For the backward every node that a module added to
autograd's graph gets a hook, which switches it before that node runs: so a part's backward includes the casts and sums
that belong to it, in whatever order autograd comes by. What lies between is counted, too, so the parts sum to the step.
While the hooks are attached the clock rests. On a GPU each switch waits for the device, which serialises what would
otherwise overlap.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moe_lm.bench import machine
from moe_lm.bench.train_step import TrainingStep
from moe_lm.model.attention import Attention
from moe_lm.model.layers import RMSNorm, SwiGLU
from moe_lm.model.moe import Experts, MoE
from moe_lm.model.transformer import Block, Transformer
from moe_lm.train import loop

PARTS = {
    "data": "the batch", "embedding": "rows of the table, angles of the rotation", "attention": "with its projections",
    "router": "logits, choice, order of the slots", "experts": "or the dense MLP", "norms": "and the residual stream",
    "loss": "projection to the vocabulary, cross-entropy, router losses",
    "clip": "the gradients' norm, by which the optimizer divides them",
    "optimizer": "and clearing the gradients", "metrics": "what a line of metrics.jsonl takes",
    "rest": "between the others",
}  # fmt: skip
"""The parts of a step, with what they hold."""
DIRECTIONS = ("forward", "recomputed", "backward")
"""What is not between the model's input and its losses counts as forward."""
MODULES = ((Attention, "attention"), (MoE, "router"), (Experts, "experts"), (SwiGLU, "experts"), (RMSNorm, "norms"),
           (Block, "norms"))  # fmt: skip
"""The part of a module, and of what happens in it outside of those inside."""

Part = tuple[str, str]
"""Name and direction."""


class Clock:
    """Seconds by part."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[Part, float] = {}
        self.part: Part = ("rest", "forward")
        self.since = self.now()

    def now(self) -> float:
        machine.synchronize(self.device)
        return time.perf_counter()

    def switch(self, part: Part) -> Part:
        """From here on time is that of `part`; gives the one before."""
        now, before = self.now(), self.part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.part, self.since = part, now
        return before

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What happens inside is nobody's."""
        self.switch(self.part)
        yield
        self.since = self.now()


class StepParts:
    """Takes steps of a trainer and tells their parts."""

    def __init__(self, step: TrainingStep):
        self.step, self.clock, self.steps = step, Clock(step.device), 0
        self.outer: list[Part] = []
        """The parts around the modules that the forward is in."""
        self.backward = False
        """Whether the model's losses are made, so that a module that runs now is computed again."""
        self.booked: dict[Any, None] = {}
        """Nodes of autograd's graph that have a part."""
        self.handles: list[Any] = []

    def take(self) -> None:
        """Take one step by the clock."""
        with ExitStack() as stack:
            self.attach(stack)
            self.clock.part, self.clock.since, self.backward = ("rest", "forward"), self.clock.now(), False
            self.step.step()
            self.clock.switch(("rest", "forward"))
            self.forget()
        self.steps += 1

    def mean(self) -> dict[Part, float]:
        """Seconds of each part in the mean of the steps so far, which they sum to."""
        return {part: seconds / self.steps for part, seconds in self.clock.seconds.items()}

    def attach(self, stack: ExitStack) -> None:
        """Hook into the model, and around what the trainer calls beside it, until `stack` closes."""
        trainer, model = self.step.trainer, self.step.model
        for module in model.modules():
            part = next((part for kind, part in MODULES if isinstance(module, kind)), None)
            if part is not None:
                enter, leave = self.hooks(part, last=module is model.norm)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                # Also where recomputation stops in the middle, which it does by an exception.
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(patch.object(model, "losses", self.around_losses(model)))
        for owner, name, part in (
            (trainer, "micro_batches", "data"), (trainer, "read_step", "metrics"), (loop, "read_losses", "metrics"),
            (loop, "gradient_norm", "clip"), (trainer.optimizer, "step", "optimizer"),
            (trainer.optimizer, "zero_grad", "optimizer"),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, self.around(getattr(owner, name), part)))

    def around(self, call: Callable, part: str) -> Callable:
        """`call`, timed as `part`; what comes after is the rest."""

        def timed(*args: Any, **options: Any) -> Any:
            self.clock.switch((part, "forward"))
            result = call(*args, **options)
            self.clock.switch(("rest", "forward"))
            return result

        return timed

    def around_losses(self, model: Transformer) -> Callable:
        """The model's losses: before the first block it embeds, and what comes after them is their backward."""
        losses = model.losses

        def timed(*args: Any) -> Any:
            self.backward = False
            self.clock.switch(("embedding", "forward"))
            found = losses(*args)
            self.book(vars(found).values(), "loss")
            self.clock.switch(("loss", "backward"))
            self.backward = True
            return found

        return timed

    def hooks(self, part: str, last: bool) -> tuple[Callable, Callable]:
        """Called as a module of `part` begins and ends; `last` if the losses follow it."""

        def enter(module: nn.Module, args: tuple) -> None:
            if not self.backward:
                self.book(args, self.clock.part[0])
            self.outer.append(self.clock.switch((part, "recomputed" if self.backward else "forward")))

        def leave(module: nn.Module, args: tuple, result: Any) -> None:
            if not self.backward:
                self.book(result, part)
            before = self.outer.pop()
            self.clock.switch(("loss", "forward") if last else before)

        return enter, leave

    def book(self, results: Any, part: str) -> None:
        """Let the nodes that `results` come from, and that have no part yet, switch the clock to `part`'s backward."""
        with self.clock.resting():
            found = [tensor.grad_fn for tensor in tensors(results) if tensor.grad_fn is not None]
            while found:
                node = found.pop()
                if node not in self.booked:
                    self.booked[node] = None
                    self.handles.append(node.register_prehook(self.switcher((part, "backward"))))
                    found += [before for before, _ in node.next_functions if before is not None]

    def switcher(self, part: Part) -> Callable:
        def hook(grads: Any) -> None:
            self.clock.switch(part)

        return hook

    def forget(self) -> None:
        """Let go of the graph; nodes of weights outlive a step, their hooks must not."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.booked.clear()


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for each in value:
            yield from tensors(each)


def table(seconds: dict[Part, float]) -> list[dict]:
    """A line for each part that took time, in milliseconds, with its share of the step."""
    total = sum(seconds.values())
    lines = []
    for name in PARTS:
        times = {direction: 1000 * seconds.get((name, direction), 0.0) for direction in DIRECTIONS}
        if any(times.values()):
            share = sum(times.values()) / 1000 / total
            lines.append({"part": name} | {f"{way}_ms": found for way, found in times.items()} | {"share": share})
    return lines
