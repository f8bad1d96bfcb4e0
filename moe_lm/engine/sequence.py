"""One sample of one request while the engine works on it. Plain data: nothing here imports torch."""

from dataclasses import dataclass, field
from enum import Enum

from moe_lm.engine.request import SamplingParams


class Status(Enum):
    """Where a sequence is in its life. Only a running one holds blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of a prompt and of its output, and how many of them the caches hold. Two are equal only if they are one.

    `tokens` given at first is the prompt. While a sequence waits or runs, at least its last token is not computed: it
    is the input of the next step.
    """

    request_id: str
    params: SamplingParams
    tokens: list[int]
    """The prompt, then the output."""
    index: int = 0
    """Which of the request's params.n samples."""
    prompt_length: int = field(init=False)
    computed: int = 0
    """Leading tokens whose keys and values in the cache are valid."""
    draft_computed: int = 0
    """The same for the cache of the draft model; never more than `computed` between two steps."""
    cached: int = 0
    """Leading tokens that the last start did not have to compute: found in the prefix cache, or shared by a fork."""
    blocks: list[int] = field(default_factory=list)
    """Blocks of the cache in order of position: token i lies in blocks[i // block_size]."""
    status: Status = Status.WAITING
    preemptions: int = 0
    """How often it lost its blocks to older sequences."""
    finish_reason: str | None = None
    """As in Output; None until it is finished."""

    def __post_init__(self):
        self.tokens = list(self.tokens)
        self.prompt_length = len(self.tokens)

    @property
    def output(self) -> list[int]:
        """A copy of the tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token of the prompt has to be computed: what is cached has no log-probabilities."""
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.tokens) == self.prompt_length

    @property
    def remaining(self) -> int:
        """New tokens that max_tokens still allows."""
        return self.prompt_length + self.params.max_tokens - len(self.tokens)

    @property
    def most_drafts(self) -> int:
        """Tokens that are worth guessing ahead: one more follows them in the same step."""
        return max(0, self.remaining - 1)

    @property
    def is_fresh(self) -> bool:
        """Whether nothing of its request has started: it is the first sample, and has waited ever since it came."""
        return self.status is Status.WAITING and not self.index and not self.preemptions
