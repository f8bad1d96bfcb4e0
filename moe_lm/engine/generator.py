"""Continue one prompt, alone or with a draft model's help."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import torch

from moe_lm.config import ConfigError
from moe_lm.engine.runner import Runner
from moe_lm.engine.sampler import SamplingParams, draw, probabilities
from moe_lm.engine.speculative import accept
from moe_lm.model import Transformer


@dataclass
class Stats:
    """What a generation took."""

    tokens: int = 0
    """New tokens."""
    steps: int = 0
    """Forward passes of the target after the prompt's."""
    proposed: int = 0
    """Drafted tokens that were verified."""
    accepted: int = 0
    """Drafted tokens that stood."""
    accepted_at: list[int] = field(default_factory=list)
    """Accepted ones by their place in the draft."""
    proposed_at: list[int] = field(default_factory=list)
    """Verified ones by their place in the draft."""
    prompt_seconds: float = 0.0
    """Time to the first token."""
    decode_seconds: float = 0.0
    """Time from the first token to the last."""

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        return (self.tokens - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """A finished continuation."""

    tokens: list[int]
    """New tokens, with the one that ended it if one did."""
    finish_reason: str
    """`stop` when an end token came, else `length`."""
    stats: Stats


class Generator:
    """A target model, and optionally a draft model with the same vocabulary that proposes `draft_tokens` at a time."""

    def __init__(self, model: Transformer, draft: Transformer | None = None, draft_tokens: int = 4, stop_ids=()):
        if draft is not None and draft.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the draft's vocab_size = {draft.config.vocab_size} is not the model's {model.config.vocab_size}: "
                "a draft must be trained with its target's tokenizer."
            )
        if draft_tokens < 1:
            raise ConfigError(
                f"draft_tokens = {draft_tokens} must be at least 1; leave the draft out to decode plainly."
            )
        self.model, self.draft, self.draft_tokens, self.stop_ids = model, draft, draft_tokens, frozenset(stop_ids)

    def generate(self, prompt: list[int], params: SamplingParams) -> Generation:
        """The whole continuation of `prompt`. Raises as `stream` does."""
        stream = Stream(self, prompt, params)
        tokens = [token for new in stream for token in new]
        return Generation(tokens, stream.finish_reason, stream.stats)

    def stream(self, prompt: list[int], params: SamplingParams) -> "Stream":
        """An iterator over the new tokens of each step, with `stats` and `finish_reason` on it.

        Raises ConfigError when the prompt is empty, holds ids that the model does not have, or when prompt and
        max_tokens exceed the context.
        """
        return Stream(self, prompt, params)


class Stream:
    """One continuation in progress. `for tokens in stream` gives the 1 to draft_tokens + 1 tokens of each step."""

    def __init__(self, generator: Generator, prompt: list[int], params: SamplingParams):
        config = generator.model.config
        if not prompt:
            raise ConfigError("the prompt is empty; give at least one token, such as the end-of-text token.")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ConfigError(f"the prompt holds token ids outside 0 to {config.vocab_size - 1}.")
        models = [generator.model] + ([generator.draft] if generator.draft else [])
        total, limit = len(prompt) + params.max_tokens, min(m.config.max_position_embeddings for m in models)
        if total > limit:
            raise ConfigError(
                f"{len(prompt)} tokens of prompt and max_tokens = {params.max_tokens} make {total}, more than the "
                f"context of {limit}; shorten the prompt or lower max_tokens."
            )
        self.generator, self.params = generator, params
        self.sequence, self.prompt_length = list(prompt), len(prompt)
        self.target = Runner(generator.model, total)
        self.draft = Runner(generator.draft, total, rows=1) if generator.draft else None
        self.random = Random(params.seed)
        self.stats, self.finish_reason = Stats(), ""

    def __iter__(self) -> Iterator[list[int]]:
        start = time.perf_counter()
        while not self.finish_reason:
            new = self.keep(self.speculate() if self.target.length else self.first())
            now = time.perf_counter()
            if self.stats.tokens == len(new):
                self.stats.prompt_seconds, first = now - start, now
            self.stats.decode_seconds = now - first
            yield new

    def keep(self, new: list[int]) -> list[int]:
        """Append new tokens up to the one that ends the sequence, and say why it ends."""
        for i, token in enumerate(new):
            if token in self.generator.stop_ids:
                new, self.finish_reason = new[: i + 1], "stop"
                break
        self.sequence += new
        self.stats.tokens += len(new)
        if not self.finish_reason and self.stats.tokens >= self.params.max_tokens:
            self.finish_reason = "length"
        return new

    def first(self) -> list[int]:
        """Read the prompt and draw one token."""
        p = probabilities(self.target.forward(self.sequence), self.params, [self.sequence])
        return [draw(p[0], self.uniform())]

    def speculate(self) -> list[int]:
        """One forward pass of the target: it verifies what the draft proposes, if anything."""
        left = self.params.max_tokens - self.stats.tokens
        drafted, q = self.propose(min(self.generator.draft_tokens, left - 1)) if self.draft else ([], None)
        known = self.target.length
        logits = self.target.forward(self.sequence[known:] + drafted, last=len(drafted) + 1)
        contexts = [self.sequence + drafted[:i] for i in range(len(drafted) + 1)]
        p = probabilities(logits, self.params, contexts)
        count, token = accept(q, p, drafted, [self.uniform() for _ in range(len(drafted) + 1)])
        self.target.truncate(len(self.sequence) + count)
        if self.draft:
            self.draft.truncate(min(self.draft.length, len(self.sequence) + count))
        self.record(len(drafted), count)
        return [*drafted[:count], token]

    def propose(self, count: int) -> tuple[list[int], torch.Tensor | None]:
        """`count` tokens drawn from the draft model one after another, and their distributions (count, V)."""
        drafted, rows = [], []
        for _ in range(count):
            sequence = self.sequence + drafted
            logits = self.draft.forward(sequence[self.draft.length :])
            rows.append(probabilities(logits, self.params, [sequence]))
            drafted.append(draw(rows[-1][0], self.uniform()))
        return drafted, torch.cat(rows) if rows else None

    def record(self, proposed: int, accepted: int) -> None:
        stats = self.stats
        stats.steps += 1
        stats.proposed += proposed
        stats.accepted += accepted
        for counts, number in ((stats.proposed_at, proposed), (stats.accepted_at, accepted)):
            counts += [0] * (max(proposed, number) - len(counts))
            for i in range(number):
                counts[i] += 1

    def uniform(self) -> float:
        return self.random.random()
