"""What an engine is at, for a display. Plain data: nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from moe_lm.engine.scheduler import Scheduler
from moe_lm.engine.sequence import Sequence

if TYPE_CHECKING:
    from moe_lm.engine.sample import Sample


class Slot(NamedTuple):
    """A sample that runs."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    phase: Literal["prefill", "decode", "verify"]
    """`prefill` until the cache holds all that it knows but the last token, and until it has a token of its own;
    `verify` where its last step verified a draft."""
    tokens: int
    """Known ones, of prompt and output."""
    prompt: int
    """Those of the prompt."""
    limit: int
    """Those of the prompt and max_tokens."""


@dataclass(frozen=True)
class Snapshot:
    """Counts of sequences and cache blocks between two steps."""

    running: int
    waiting: int
    """Those that were preempted, and later samples of a request without room for them yet, included."""
    slots: list[Slot]
    """Of the running ones, oldest first."""
    waiting_requests: frozenset[str]
    """Requests of which nothing has started."""
    block_size: int
    """Tokens of a block."""
    blocks: int
    """In all."""
    used: int
    """That running samples hold."""
    cached: int
    """That nobody holds, and which could still be found."""


def take_snapshot(scheduler: Scheduler, samples: Mapping[Sequence, "Sample"]) -> Snapshot:
    """The state of a scheduler and of the samples of its sequences."""
    running, pool = scheduler.running, scheduler.pool
    return Snapshot(
        running=len(running),
        waiting=len(scheduler.waiting),
        slots=[slot_of(sequence, samples[sequence].verified) for sequence in running],
        waiting_requests=frozenset(scheduler.unstarted()),
        block_size=pool.block_size,
        blocks=pool.num_blocks,
        used=pool.num_blocks - pool.available,
        cached=pool.cached,
    )


def slot_of(sequence: Sequence, verified: bool) -> Slot:
    known, prompt = len(sequence.tokens), sequence.prompt_length
    phase = "verify" if verified else "decode"
    if known - sequence.computed > 1 or known == prompt:
        phase = "prefill"
    return Slot(sequence.request_id, sequence.index, phase, known, prompt, prompt + sequence.params.max_tokens)
