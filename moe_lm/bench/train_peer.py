"""Hugging Face transformers as a contender in training: the same weights, tokens and loss, in its fastest form."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_lm.bench.train_step import TrainingStep, tokens_per_second
from moe_lm.checkpoint import save_hf
from moe_lm.config import ModelConfig, require
from moe_lm.data.tokenizer import train_tokenizer
from moe_lm.model.device import memory_of

EXPERTS = ("grouped_mm", "batched_mm", "eager")
"""Ways in which transformers 5 computes experts; version 4 has one."""
FORMS = ("bfloat16 copies", "autocast")
"""Ways to bfloat16 compute with float32 weights: bfloat16 weights that are copied from float32 ones after each step, or
float32 weights that torch.autocast casts. Its grouped_mm does not cast, so there the experts stay in float32."""


class PeerStep:
    """Optimizer steps of the model of `ours`, opened by transformers, from the same weights on the same tokens.

    Its own cross-entropy and router loss, clipping, fused AdamW over one group. `form` is one of FORMS, or float32.
    """

    def __init__(self, ours: TrainingStep, form: str):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version = transformers.__version__
        model, train = ours.model, ours.run.train
        with tempfile.TemporaryDirectory(prefix="moe_lm-bench-") as directory:
            # A model directory has a tokenizer; random weights come without, and any will do.
            save_hf(directory, model, train_tokenizer((), 257))
            self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model.to(ours.device).train()
        self.model.config.use_cache = False
        self.options = {"output_router_logits": True} if model.config.is_moe else {}
        self.form, self.device, self.tokens = form, ours.device, ours.tokens
        self.batch = ours.data.batch.to(ours.device)
        self.limit = train.max_grad_norm or float("inf")
        self.masters = list(self.model.parameters())
        self.copies: list[Tensor] = []
        if form == "bfloat16 copies":
            self.masters = [parameter.detach().clone() for parameter in self.masters]
            self.model.to(torch.bfloat16)
            self.copies = list(self.model.parameters())
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.adam_eps,
            weight_decay=train.weight_decay, fused=True,
        )  # fmt: skip
        self.own_experts = getattr(self.model.config, "_experts_implementation", None) if model.config.is_moe else None
        """How it computes experts by default; None for a dense model, and in version 4, where there is no choice."""
        self.experts = self.own_experts

    def choose_experts(self, name: str | None) -> None:
        if name is not None:
            self.model.set_experts_implementation(name)
        self.experts = name

    def step(self) -> float:
        """Take one, and give its loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.form == "autocast"):
            loss = self.loss()
        loss.backward()
        if self.copies:
            torch._foreach_copy_([master.grad for master in self.masters], [copy.grad for copy in self.copies])
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.limit, foreach=True)
        # What a run logs and watches, as ours does.
        found = loss.item() + 0 * norm.item()
        self.optimizer.step()
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.masters)
            self.model.zero_grad()
        else:
            self.optimizer.zero_grad()
        return found

    def loss(self) -> Tensor:
        """Mean cross-entropy and the weighted router loss, by the model itself."""
        batch = self.batch
        return self.model(
            input_ids=batch.tokens, position_ids=batch.positions, labels=batch.targets, shift_labels=batch.targets,
            **self.options,
        ).loss  # fmt: skip


def batched_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the weights that batched_mm gathers for every slot and keeps for the backward."""
    expert = 3 * config.hidden_size * config.expert_size
    return tokens * config.num_experts_per_tok * expert * itemsize * len(config.routing_layers)


class Peer:
    """The fastest of all forms and ways to compute experts, found by trying each for a few steps.

    `trials` are the tokens/s of each one's fastest step, since other work only slows it; `failures` say why one was not
    tried or could not run. Raises ConfigError where none can.
    """

    def __init__(self, ours: TrainingStep, steps: int = 3, make: Callable[..., PeerStep] = PeerStep):
        self.trials: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        best: tuple[float, PeerStep, str | None] | None = None
        for form in FORMS if ours.dtype == "bfloat16" else ("float32",):
            step = make(ours, form)
            for name in EXPERTS if step.own_experts else (None,):
                label = f"{name} experts, {form}" if name else form
                with self.noting(label):
                    self.check_memory(ours, name, form)
                    step.choose_experts(name)
                    step.step()  # the first compiles its kernels
                    rate = self.trials[label] = max(tokens_per_second(step, 1) for _ in range(steps))
                    if best is None or rate > best[0]:
                        best = (rate, step, name)
        require(
            best is not None,
            f"transformers cannot train this model: {'; '.join(f'{k}: {v}' for k, v in self.failures.items())}",
        )
        _, self.step, experts = best
        self.step.choose_experts(experts)
        self.setting = max(self.trials, key=self.trials.__getitem__)
        self.version = self.step.version

    def __call__(self, steps: int = 3) -> float:
        """Tokens per second of a few steps of the fastest."""
        return tokens_per_second(self.step, steps)

    def facts(self) -> dict[str, Any]:
        """What it is, for the JSON."""
        return {
            "version": self.version, "setting": self.setting, "trials": self.trials, "not_measured": self.failures,
        }  # fmt: skip

    @contextmanager
    def noting(self, label: str) -> Iterator[None]:
        """Whatever a library raises about a setting of its own means that this setting is none of the contenders."""
        try:
            yield
        except Exception as error:
            self.failures[label] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def check_memory(self, ours: TrainingStep, name: str | None, form: str) -> None:
        if name == "batched_mm":
            itemsize = 4 if form == "float32" else 2
            needed = batched_bytes(ours.run.model, ours.tokens, itemsize)
            memory = memory_of(ours.device)
            if memory is not None and needed > memory / 2:
                raise MemoryError(
                    f"it keeps {needed / 1e9:,.0f} GB of gathered weights, and {ours.device} has {memory / 1e9:,.0f} GB"
                )
