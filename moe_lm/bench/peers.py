"""Hugging Face transformers as a contender, with the same weights in the same dtype."""

import tempfile
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_lm.bench.throughput import CannotMeasure, Contender, Timeline
from moe_lm.bench.workload import Case, Workload
from moe_lm.checkpoint import save_hf
from moe_lm.data.tokenizer import train_tokenizer
from moe_lm.model import Transformer

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Ways in which transformers 5 computes experts; version 4 has one."""
STATIC_BATCHES = (8, 16, 32)
"""Sizes of batch that a trace is tried in: transformers serves requests in batches that end together."""
TRIAL_TOKENS = 32
"""New tokens of a request in the trial of a setting."""


class Setting(NamedTuple):
    """How transformers is told to compute; None leaves a choice to it."""

    experts: str | None = None
    cache: str | None = None

    def __str__(self) -> str:
        words = [f"{self.experts} experts" if self.experts else "", f"{self.cache} cache" if self.cache else ""]
        return ", ".join(filter(None, words)) or "default"


DEFAULT = Setting()


class Clock:
    """A stopping criterion that stops nothing and knows when a batch got its first tokens."""

    def __init__(self):
        self.first: float | None = None

    def __call__(self, tokens: Tensor, scores: Any, **options: Any) -> Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


class TransformersPeer:
    """A model of ours opened by transformers, which must be installed."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        weight = model.embed_tokens
        with tempfile.TemporaryDirectory(prefix="moe_lm-bench-") as directory:
            # A model directory has a tokenizer; random weights come without, and any will do.
            save_hf(directory, model, tokenizer or train_tokenizer((), 257))
            self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=weight.dtype)
        self.model.to(weight.device).eval()
        self.version = transformers.__version__
        self.model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0)
        self.own_experts = getattr(self.model.config, "_experts_implementation", None) if model.config.is_moe else None
        """How it computes experts by default; None for a dense model, and in version 4, where there is no choice."""
        self.decode_setting = DEFAULT
        """The fastest of the last case of decoding."""
        self.failures: dict[str, str] = {}
        """Settings that could not run, and why."""

    def settings(self) -> list[Setting]:
        """All that are tried: every way to compute experts, with the cache that grows and the one that does not."""
        others = [kind for kind in EXPERTS if self.own_experts not in (None, kind)]
        return [Setting(kind, cache) for cache in (None, "static") for kind in (None, *others)]

    def contenders(self, case: Case, work: Workload) -> dict[str, Contender]:
        """`default`, and by its name the setting that is fastest in trials on `work`, where that is another one.

        Raises CannotMeasure if the default setting fails.
        """
        if case.name == "trace":
            settings = dict.fromkeys((DEFAULT, self.decode_setting))
            sizes = [size for size in STATIC_BATCHES if size < case.batch] + [case.batch]
        else:
            settings, sizes = self.settings(), [case.batch]
        rates = self.trials(case.name, work.shortened(TRIAL_TOKENS), settings, sizes)
        own = {key: rate for key, rate in rates.items() if key[0] == DEFAULT}
        if not own:
            raise CannotMeasure(f"transformers cannot do it with its default setting: {self.failures[str(DEFAULT)]}")
        default, fastest = (max(found, key=found.__getitem__) for found in (own, rates))
        if case.name == "decode":
            self.decode_setting = fastest[0]
        named = {"default": default, str(fastest[0]): fastest}
        return {name: partial(self.run, setting=setting, size=size) for name, (setting, size) in named.items()}

    def trials(
        self, name: str, work: Workload, settings: Iterable[Setting], sizes: list[int]
    ) -> dict[tuple[Setting, int], float]:  # fmt: skip
        """Tokens per second of every setting that can run, each in batches of every size."""
        rates = {}
        for setting in settings:
            try:
                for size in sizes:
                    self.run(work.shortened(3), setting, size)  # the first pass of a shape compiles its kernels
                    rates[setting, size] = self.run(work, setting, size).rate(name)
            # Whatever a library raises about a setting of its own means that this setting is none of the contenders.
            except Exception as error:
                self.failures[str(setting)] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return rates

    def run(self, work: Workload, setting: Setting, size: int) -> Timeline:
        """Serve the requests in their order, in batches of `size`. Tokens beyond those asked for do not count."""
        if self.own_experts is not None:
            self.model.set_experts_implementation(setting.experts or self.own_experts)
        start = time.perf_counter()
        tokens, first_tokens, first_seconds = 0, 0, 0.0
        for at in range(0, len(work.prompts), size):
            outputs, clock = work.outputs[at : at + size], Clock()
            self.generate(work.prompts[at : at + size], max(outputs), setting, clock)
            first_tokens, first_seconds = tokens + len(outputs), clock.first - start
            tokens += sum(outputs)
        seconds = time.perf_counter() - start
        return Timeline(sum(map(len, work.prompts)), first_tokens, first_seconds, tokens, seconds)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int, setting: Setting, clock: Clock) -> Tensor:
        """Continue a batch greedily by `new` tokens, int64 (B, new). Short prompts are padded on the left."""
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens, attended = (torch.tensor(rows, device=self.model.device) for rows in (padded, mask))
        cache = {} if setting.cache is None else {"cache_implementation": setting.cache}
        out = self.model.generate(
            tokens, attention_mask=attended, max_new_tokens=new, stopping_criteria=[clock], **cache
        )  # fmt: skip
        assert out.shape == (len(prompts), width + new), f"transformers gave {tuple(out.shape)}"
        return out[:, width:]
