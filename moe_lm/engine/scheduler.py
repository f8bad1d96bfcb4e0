"""What each step computes: continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al.
2023) over the block pool. Plain Python: nothing here imports torch.

The age of a sequence is its place in `running` followed by `waiting`. Whoever is preempted is the last of `running` and
becomes the first of `waiting`, so the two stay one queue in order of arrival. A sequence is admitted when there are
blocks for all tokens that it knows, so only decoding can run out of blocks, one at a time. The oldest can then always
go on: in the worst case all others are preempted, and `add` has made sure that it fits alone.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_lm.config import ConfigError
from moe_lm.engine.block_pool import BlockPool
from moe_lm.engine.sequence import Sequence, Status


class ContextError(ConfigError):
    """A prompt and its max_tokens that are more than the context, or than the whole cache holds."""


@dataclass(slots=True, eq=False)
class Work:
    """What one sequence brings to one step.

    When its sequence is no longer running after the step, it was aborted meanwhile: its results are to be dropped.
    """

    sequence: Sequence
    start: int
    """Position of the first token to compute: sequence.computed."""
    count: int
    """Known tokens to compute: sequence.tokens[start : start + count]."""
    samples: bool
    """Whether the last known token is among them and max_tokens is not 0, so that the step gives new tokens."""
    drafts: int = 0
    """Slots after them for tokens guessed ahead; 0 unless `samples`."""


@dataclass(slots=True)
class Plan:
    """One step."""

    work: list[Work] = field(default_factory=list)
    """Decoding sequences first, then prefill chunks."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks (source, destination) to be copied, in this order, before anything of the step is written: a later
    destination may be an earlier source."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that went back to the queue for want of blocks."""
    started: list[Sequence] = field(default_factory=list)
    """First samples that started for the first time; `cached` is what the prefix cache had of their prompts."""


class Scheduler:
    """Shares the pool and `max_step_tokens` new tokens per step among at most `max_sequences` running sequences.

    A step is `schedule`, the computation, `advance` for each work, then `fork` and `finish` where they apply; `add` and
    `abort` may come at any moment. Raises ConfigError if a step cannot hold one token of every running sequence.
    """

    def __init__(self, pool: BlockPool, *, max_step_tokens: int, max_sequences: int, context: int):
        if max_sequences < 1:
            raise ConfigError(f"max_sequences = {max_sequences} must be at least 1.")
        if max_step_tokens < max_sequences:
            raise ConfigError(
                f"max_step_tokens = {max_step_tokens} must be at least max_sequences = {max_sequences}, one token "
                "for every running sequence; raise it or lower max_sequences."
            )
        self.pool, self.context = pool, context
        self.max_step_tokens, self.max_sequences = max_step_tokens, max_sequences
        self.running: list[Sequence] = []
        """Oldest first."""
        self.waiting: deque[Sequence] = deque()
        """Next to be admitted first."""

    def add(self, sequences: list[Sequence]) -> None:
        """Queue new sequences behind all others; all of them or, when it raises, none.

        Raises ConfigError when a prompt is empty, or when a sequence could not reach its full length with the whole
        cache to itself. Drafts do not count there: they only take slots that are free.
        """
        for sequence in sequences:
            self.require_fit(sequence.prompt_length, sequence.params.max_tokens)
        self.waiting.extend(sequences)

    def require_fit(self, prompt: int, new: int) -> None:
        """See that so many tokens of prompt and new ones can be served with the whole cache to themselves. Raises
        ContextError where they are too many, ConfigError for an empty prompt."""
        pool = self.pool
        if not prompt:
            raise ConfigError("the prompt is empty; give at least one token, such as the end-of-text token.")
        if prompt + new > self.context:
            raise ContextError(
                f"{prompt} tokens of prompt and max_tokens = {new} make {prompt + new}, more than the context of "
                f"{self.context}; shorten the prompt or lower max_tokens."
            )
        # The last new token is never computed.
        blocks = pool.blocks_for(prompt + max(0, new - 1))
        if blocks > pool.num_blocks:
            raise ContextError(
                f"{prompt} tokens of prompt and max_tokens = {new} need {blocks} cache blocks of {pool.block_size} "
                f"tokens, more than the {pool.num_blocks} that kv_memory holds; lower max_tokens or raise kv_memory."
            )

    def unstarted(self) -> set[str]:
        """Requests of which nothing has started. Goes through those that wait."""
        return {sequence.request_id for sequence in self.waiting if sequence.is_fresh}

    def schedule(self, draft_length: Callable[[Sequence], int]) -> Plan:
        """The next step; empty only when nothing runs or waits.

        draft_length(sequence): most tokens to guess ahead for a sequence that decodes. It is cut to what max_tokens
        (and so the context) leaves, to the step's tokens and to free blocks, never at the price of another sequence.
        """
        plan = Plan()
        self._decode(plan)
        budget = self.max_step_tokens - len(plan.work)
        budget -= self._speculate(plan, draft_length)
        for sequence in self.running:
            if budget and len(sequence.tokens) - sequence.computed > 1:
                budget -= self._prefill(plan, sequence, budget)
        # What could be admitted right after a preemption is the sequence that has just made room.
        while budget and self.waiting and len(self.running) < self.max_sequences and not plan.preempted:
            if not self._admit(plan):
                break
            budget -= self._prefill(plan, self.running[-1], budget)
        return plan

    def advance(self, work: Work, new_tokens: list[int]) -> None:
        """Book a computed `work`: `new_tokens` are the drafts that stood and the token that followed them.

        They are none if the work did not sample, else 1 to work.drafts + 1; fewer than stood if the output ends among
        them. Slots of rejected drafts are given back. The caller has set sequence.draft_computed to what the draft
        model computed; it is cut to what stood.
        """
        sequence, pool = work.sequence, self.pool
        assert sequence.status is Status.RUNNING, f"{sequence.request_id} is {sequence.status.value}"
        assert sequence.computed == work.start, f"computed {sequence.computed} tokens, the work began at {work.start}"
        accepted = len(new_tokens) - work.samples
        assert 0 <= accepted <= work.drafts, f"{len(new_tokens)} new tokens after {work.drafts} drafts"
        sequence.tokens += new_tokens
        sequence.computed = work.start + work.count + accepted
        pool.register(sequence.blocks, sequence.tokens, sequence.computed)
        if sequence.draft_computed:
            sequence.draft_computed = min(sequence.draft_computed, sequence.computed)
            pool.mark_drafted(sequence.blocks, sequence.draft_computed)
        kept = pool.blocks_for(len(sequence.tokens))
        if len(sequence.blocks) > kept:
            pool.release(sequence.blocks[kept:])
            del sequence.blocks[kept:]

    def fork(self, sequence: Sequence, count: int) -> list[Sequence]:
        """`count` more samples of a prompt that has been computed, with the next indices; before `finish`, if any.

        They come right after `sequence` in age, sharing its blocks of the prompt, the partly filled last one too: the
        first to write there copies it, the last owner need not. Each computes the prompt's last token once more, as its
        first step, and so draws its first token like any other. Those beyond max_sequences wait in front of the queue
        and start from what the prefix cache holds then.
        """
        assert sequence.status is Status.RUNNING, f"{sequence.request_id} is {sequence.status.value}"
        assert sequence.computed >= sequence.prompt_length, "the prompt is not computed yet"
        prompt, known = sequence.tokens[: sequence.prompt_length], sequence.prompt_length - 1
        indices = range(sequence.index + 1, sequence.index + 1 + count)
        children = [Sequence(sequence.request_id, sequence.params, prompt, index) for index in indices]
        room = self.max_sequences - len(self.running)
        for child in children[:room]:
            child.status = Status.RUNNING
            child.blocks = sequence.blocks[: self.pool.blocks_for(known)]
            child.computed = child.cached = known
            child.draft_computed = min(sequence.draft_computed, known)
            self.pool.acquire(child.blocks)
        place = self.running.index(sequence) + 1
        self.running[place:place] = children[:room]
        self.waiting.extendleft(reversed(children[room:]))
        return children

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a waiting or running sequence and give its blocks back.

        Without an `advance` before it, nothing that the last step wrote can be found: so a failed step is dropped.
        """
        assert sequence.status is not Status.FINISHED, f"{sequence.request_id} has finished: {sequence.finish_reason}"
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._release(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def abort(self, request_id: str) -> list[Sequence]:
        """End every sample of a request, waiting, running or in the middle of a step; none if it is not there."""
        found = [sequence for sequence in (*self.running, *self.waiting) if sequence.request_id == request_id]
        for sequence in found:
            self.finish(sequence, "abort")
        return found

    def _decode(self, plan: Plan) -> None:
        """One token for every running sequence that lacks only its last, oldest first."""
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            if len(sequence.tokens) - sequence.computed == 1:
                unfinished = sequence.remaining > 0 or sequence.computed < sequence.prompt_length
                assert unfinished, f"{sequence.request_id} has all its tokens but was not finished"
                if not self._make_writable(sequence, plan):
                    break
                plan.work.append(Work(sequence, sequence.computed, 1, sequence.remaining > 0))
            i += 1

    def _make_writable(self, sequence: Sequence, plan: Plan) -> bool:
        """See that the slot of the last token is there and is the sequence's own. False if it was preempted itself."""
        pool, blocks, i = self.pool, sequence.blocks, sequence.computed // self.pool.block_size
        # Asked anew after each preemption, which may have taken the other owners of a shared block.
        while i == len(blocks) or not pool.claim(blocks[i]):
            if not pool.available:
                youngest = self.running[-1]
                self._preempt(youngest, plan)
                if youngest is sequence:
                    return False
                continue
            new = pool.allocate(1)
            if i < len(blocks):
                plan.copies.append((blocks[i], new[0]))
                pool.release(blocks[i : i + 1])
            blocks[i : i + 1] = new
        return True

    def _speculate(self, plan: Plan, draft_length: Callable[[Sequence], int]) -> int:
        """Slots for drafts in what the decoding sequences leave, oldest first; how many in all."""
        # Every sequence that runs, or could start, keeps one token of the step, so that drafts starve nobody.
        left = room = self.max_step_tokens - min(self.max_sequences, len(self.running) + len(self.waiting))
        pool = self.pool
        for work in plan.work:
            sequence = work.sequence
            if wanted := draft_length(sequence):
                known, held = len(sequence.tokens), len(sequence.blocks)
                slots = (held + pool.available) * pool.block_size - known
                work.drafts = min(wanted, sequence.most_drafts, left, slots)
                left -= work.drafts
                sequence.blocks += pool.allocate(pool.blocks_for(known + work.drafts) - held)
        return room - left

    def _prefill(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """At most `budget` tokens that are not computed; how many."""
        unknown = len(sequence.tokens) - sequence.computed
        count = min(budget, unknown)
        plan.work.append(Work(sequence, sequence.computed, count, count == unknown and sequence.remaining > 0))
        return count

    def _admit(self, plan: Plan) -> bool:
        """Start the first waiting sequence, if there are blocks for all tokens that it knows."""
        sequence = self.waiting[0]
        # One block is left for each sequence that runs: it will want it within block_size tokens, and would take it
        # from the one that is admitted here.
        spare, reuse = len(self.running), not sequence.needs_whole_prompt
        admitted = self.pool.admit(sequence.tokens, spare, reuse)
        if admitted is None:
            return False
        sequence.blocks, sequence.cached = admitted
        sequence.computed = sequence.cached
        sequence.draft_computed = self.pool.drafted(sequence.blocks)
        if sequence.is_fresh:
            plan.started.append(sequence)
        sequence.status = Status.RUNNING
        self.running.append(self.waiting.popleft())
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Back to the front of the queue; its tokens will be computed again, but for those that are found."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)
        plan.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.draft_computed = 0
