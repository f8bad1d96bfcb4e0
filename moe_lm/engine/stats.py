"""What an engine counted since it was made or since its counters were reset."""

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from moe_lm.engine.batch import Piece
from moe_lm.engine.sample import Sample
from moe_lm.engine.scheduler import Plan, Work
from moe_lm.engine.verdict import Verdict

PHASES = ("schedule", "draft", "forward", "sample", "output")


class Timer:
    """Adds the seconds of a `with` block to those of a phase."""

    def __init__(self, seconds: dict[str, float], phase: str):
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds[self.phase] += time.perf_counter() - self.start


@dataclass
class Stats:
    """Counters; seconds are of the wall clock."""

    steps: int = 0
    """Forward passes of the target."""
    computed: int = 0
    """Tokens that went through the target, drafted ones that were rejected included."""
    tokens: int = 0
    """New tokens."""
    prompt_tokens: int = 0
    """Tokens of the prompts that started, each counted once."""
    cached_tokens: int = 0
    """Those of them that were found in the prefix cache."""
    chunks: int = 0
    """Steps of a prompt after which more of it was left."""
    preemptions: int = 0
    """Times that a sequence lost its blocks and had to be computed again."""
    copies: int = 0
    """Shared blocks that were copied because one of their owners wrote."""
    decodes: int = 0
    """Times that a sequence got tokens from a step after its first one."""
    decoded: int = 0
    """Tokens that it got there."""
    verifies: int = 0
    """Times that a draft was verified."""
    proposed_at: dict[str, list[int]] = field(default_factory=dict)
    """Drafted tokens that were verified, by kind of speculation and by place in the draft."""
    accepted_at: dict[str, list[int]] = field(default_factory=dict)
    """Those that stood."""
    experts_touched: dict[int, float] = field(default_factory=dict)
    """Distinct experts of one decoding sequence in a step, mean over layers, by how many tokens it brought: summed."""
    decodes_of: dict[int, int] = field(default_factory=dict)
    """How many decoding sequences brought so many tokens; what `experts_touched` is to be divided by."""
    experts: int = 0
    """Distinct experts of all layers that the steps read."""
    expert_tokens: np.ndarray | None = None
    """Computed tokens that each expert of each routing layer got, int64 (M, E); None before a mixture's first step."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """By phase of a step."""

    def timed(self, phase: str) -> "Timer":
        return Timer(self.seconds, phase)

    def count_plan(self, plan: Plan) -> None:
        """Count what is decided before a step."""
        self.preemptions += len(plan.preempted)
        self.copies += len(plan.copies)
        self.prompt_tokens += sum(sequence.prompt_length for sequence in plan.started)
        self.cached_tokens += sum(sequence.cached for sequence in plan.started)

    def count(
        self, pieces: list[Piece], works: list[Work], samples: list[Sample], verdicts: list[Verdict], experts: Tensor,
        num_experts: int,
    ) -> None:  # fmt: skip
        """Count a step; experts (M, N, K) are those that its tokens chose, of `num_experts`."""
        self.steps += 1
        self.computed += experts.shape[1]
        present = touched(experts, [len(piece.tokens) for piece in pieces], num_experts)
        self.experts += int(np.count_nonzero(present.any(0)))
        if len(experts):
            got = loads(experts, num_experts)
            self.expert_tokens = got if self.expert_tokens is None else self.expert_tokens + got
        each = (present.reshape(len(pieces), -1).sum(1) / max(1, present.shape[1])).tolist()
        for piece, work, sample, verdict, number in zip(pieces, works, samples, verdicts, each, strict=True):
            self.chunks += work.start + work.count < len(work.sequence.tokens)
            self.tokens += len(verdict.tokens)
            if not work.samples or len(work.sequence.tokens) == work.sequence.prompt_length:
                continue
            n, proposed = len(piece.tokens), len(verdict.draft.tokens)
            self.decodes += 1
            self.decoded += len(verdict.tokens)
            self.experts_touched[n] = self.experts_touched.get(n, 0.0) + number
            self.decodes_of[n] = self.decodes_of.get(n, 0) + 1
            if proposed:
                self.verifies += 1
                add_places(self.proposed_at.setdefault(sample.kind, []), proposed)
                add_places(self.accepted_at.setdefault(sample.kind, []), verdict.accepted)

    @property
    def proposed(self) -> int:
        return sum(map(sum, self.proposed_at.values()))

    @property
    def accepted(self) -> int:
        return sum(map(sum, self.accepted_at.values()))

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding sequence got from one step."""
        return self.decoded / self.decodes if self.decodes else 0.0


def add_places(counts: list[int], number: int) -> None:
    """One more at each of the first `number` places."""
    counts += [0] * (number - len(counts))
    for place in range(number):
        counts[place] += 1


def touched(experts: Tensor, lengths: list[int], num_experts: int) -> np.ndarray:
    """Which experts each sequence of a step chose, bool (S, M, E), given experts (M, N, K) and tokens by sequence."""
    chosen = experts.cpu().numpy()
    layers, sequences = len(chosen), len(lengths)
    present = np.zeros((sequences, layers, num_experts), np.bool_)
    owner, layer = np.arange(sequences).repeat(lengths), np.arange(layers)
    present[owner[None, :, None], layer[:, None, None], chosen] = True
    return present


def loads(experts: Tensor, num_experts: int) -> np.ndarray:
    """How many tokens each expert of each layer got, int64 (M, E), given experts (M, N, K)."""
    layers = len(experts)
    ids = experts.cpu().numpy().reshape(layers, -1) + num_experts * np.arange(layers)[:, None]
    return np.bincount(ids.ravel(), minlength=layers * num_experts).reshape(layers, num_experts)
