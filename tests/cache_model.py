"""The engine without a model: what every step would write into the caches and read from them, in plain Python."""

import random
from collections import Counter

import pytest

from moe_lm.engine.batch import places
from moe_lm.engine.block_pool import BlockPool
from moe_lm.engine.request import SamplingParams
from moe_lm.engine.scheduler import ContextError, Plan, Scheduler, Work
from moe_lm.engine.sequence import Sequence, Status


def make(blocks=16, size=4, *, tokens=64, sequences=8, context=256, **pool) -> Scheduler:
    pool = BlockPool(blocks, size, **pool)
    return Scheduler(pool, max_step_tokens=tokens, max_sequences=sequences, context=context)


def request(name: str, prompt: int | list[int], max_tokens=8, n=1, **params) -> Sequence:
    """A prompt of its own unless the tokens are given."""
    tokens = [1000 * ord(name[0]) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(name, SamplingParams(max_tokens=max_tokens, n=n, **params), tokens)


def no_drafts(sequence: Sequence) -> int:
    return 0


class Simulation:
    """An engine without a model: the contents of the caches are what each step would have written there.

    A text is a number: `texts` maps (text, token) to the text that is one token longer, so that two cells hold the
    same number only if they hold the same token after the same tokens.
    """

    def __init__(self, rng: random.Random, **shape):
        self.rng, self.scheduler = rng, make(**shape)
        self.pool, self.context = self.scheduler.pool, self.scheduler.context
        self.texts, self.cells, self.draft_cells = {}, {}, {}
        self.allocated, self.counts, self.samples, self.names = [], Counter(), {}, 0
        allocate = self.pool.allocate

        def watched(n: int) -> list[int]:
            blocks = allocate(n)
            self.allocated += blocks
            return blocks

        self.pool.allocate = watched

    def spell(self, tokens: list[int]) -> list[int]:
        """The text that each token ends."""
        text, spelled = 0, []
        for token in tokens:
            text = self.texts.setdefault((text, token), len(self.texts) + 1)
            spelled.append(text)
        return spelled

    def add(self, prompt: list[int], max_tokens: int, n: int) -> None:
        self.names += 1
        sequence = request(str(self.names), prompt, max_tokens, n)
        total = len(prompt) + max_tokens
        if total > self.context or self.pool.blocks_for(max(len(prompt), total - 1)) > self.pool.num_blocks:
            with pytest.raises(ContextError, match="max_tokens"):
                self.scheduler.add([sequence])
            self.counts["refused"] += 1
            return
        self.scheduler.add([sequence])
        self.samples[sequence.request_id] = [sequence]

    def abort(self, name: str) -> None:
        alive = [sequence for sequence in self.samples[name] if sequence.status is not Status.FINISHED]
        assert set(self.scheduler.abort(name)) == set(alive)
        self.counts["aborted"] += bool(alive)

    def alive(self) -> list[str]:
        """Names of the requests that are not finished."""
        return list(dict.fromkeys(s.request_id for s in (*self.scheduler.running, *self.scheduler.waiting)))

    def step(self, abort_within: str | None = None) -> None:
        rng, scheduler = self.rng, self.scheduler
        self.allocated.clear()
        self.fresh = [self.samples[name][0] for name in scheduler.unstarted()]
        plan = scheduler.schedule(lambda sequence: rng.choice([0, 0, 1, 2, 5]))
        self.check_plan(plan)
        self.copy(plan)
        # Guesses come before the step, then all its keys and values are written before any are read.
        guesses = {work: [rng.randrange(2) for _ in range(work.drafts)] for work in plan.work}
        for work in plan.work:
            self.guess(work, guesses[work])
        for work in plan.work:
            spelled = self.spell(work.sequence.tokens + guesses[work])
            self.write(self.cells, work.sequence, spelled, work.start, work.start + work.count + work.drafts)
        for work in plan.work:
            spelled = self.spell(work.sequence.tokens + guesses[work])
            self.read(self.cells, work.sequence, spelled, work.start + work.count + work.drafts)
        if abort_within is not None:
            self.abort(abort_within)
        for work in plan.work:
            if work.sequence.status is Status.RUNNING:
                self.advance(work, guesses[work])
        self.check_books()

    def check_plan(self, plan: Plan) -> None:
        scheduler, running = self.scheduler, self.scheduler.running
        assert plan.work or not (running or scheduler.waiting), "nothing to do although somebody waits"
        assert sum(work.count + work.drafts for work in plan.work) <= scheduler.max_step_tokens
        assert len(running) <= scheduler.max_sequences
        sequences = [work.sequence for work in plan.work]
        assert len(set(sequences)) == len(sequences)
        if running:
            assert running[0] in sequences, "the oldest does not go on"
        for work in plan.work:
            sequence = work.sequence
            assert sequence.status is Status.RUNNING
            assert work.start == sequence.computed
            assert (sequence in plan.started) == (sequence in self.fresh)
            assert work.count >= 1
            whole = work.start + work.count == len(sequence.tokens)
            assert work.samples == (whole and sequence.params.max_tokens > 0)
            self.counts["prompts alone"] += whole and not sequence.params.max_tokens
            assert 0 <= work.drafts <= max(sequence.remaining - 1, 0) * work.samples
            end = work.start + work.count + work.drafts
            written = sequence.blocks[work.start // self.pool.block_size : self.pool.blocks_for(end)]
            assert all(map(self.pool.writable, written)), "a shared block would be written"
            assert not set(written) & set(self.pool.match([*sequence.tokens, 0])), "a findable block would be written"
        for sequence in running:
            if len(sequence.tokens) - sequence.computed == 1:
                assert sequence in sequences, "a decoding sequence is left out"
        destinations = [destination for _, destination in plan.copies]
        assert len(set(destinations)) == len(destinations)
        for i, (source, _) in enumerate(plan.copies):
            assert source not in destinations[:i], "a copy would be of a copy"
        self.counts["preempted"] += len(plan.preempted)
        self.counts["copies"] += len(plan.copies)
        self.counts["chunks"] += sum(not work.samples for work in plan.work)
        self.counts["mixed"] += 0 < sum(work.count == 1 for work in plan.work) < len(plan.work)

    def copy(self, plan: Plan) -> None:
        """Allocated blocks hold nothing, but what is copied into them."""
        size = self.pool.block_size
        for cells in (self.cells, self.draft_cells):
            moved = {
                destination * size + offset: cells.get(source * size + offset)
                for source, destination in plan.copies
                for offset in range(size)
            }
            for block in self.allocated:
                for slot in range(block * size, (block + 1) * size):
                    cells[slot] = moved.get(slot)

    def write(self, cells: dict, sequence: Sequence, spelled: list[int], start: int, end: int) -> None:
        cells.update(zip(self.slots(sequence, start, end), spelled[start:end], strict=True))

    def read(self, cells: dict, sequence: Sequence, spelled: list[int], end: int) -> None:
        """What a sequence attends to is its own past."""
        assert [cells.get(slot) for slot in self.slots(sequence, 0, end)] == spelled[:end]

    def slots(self, sequence: Sequence, start: int, end: int) -> list[int]:
        return places(sequence.blocks, self.scheduler.pool.block_size, start, end)

    def guess(self, work: Work, guesses: list[int]) -> None:
        """The draft model catches up where tokens are guessed, then computes its own guesses but the last."""
        if guesses:
            sequence = work.sequence
            spelled = self.spell(sequence.tokens + guesses[:-1])
            self.write(self.draft_cells, sequence, spelled, sequence.draft_computed, len(spelled))
            self.read(self.draft_cells, sequence, spelled, len(spelled))
            sequence.draft_computed = len(spelled)

    def advance(self, work: Work, guesses: list[int]) -> None:
        rng, scheduler, sequence = self.rng, self.scheduler, work.sequence
        accepted = rng.randint(0, work.drafts)
        new = [*guesses[:accepted], rng.randrange(2)] if work.samples else []
        # A stop token may be among the accepted ones: the rest is dropped and the sequence ends.
        stopped = work.samples and rng.random() < 0.05
        first = work.samples and len(sequence.tokens) == sequence.prompt_length and sequence.index == 0
        scheduler.advance(work, new[: rng.randint(1, len(new))] if stopped else new)
        self.counts["accepted"] += accepted
        self.counts["rejected"] += work.drafts - accepted
        if first and sequence.params.n > 1:
            self.samples[sequence.request_id] += scheduler.fork(sequence, sequence.params.n - 1)
        if stopped or (not sequence.remaining and sequence.computed >= sequence.prompt_length):
            scheduler.finish(sequence, "stop" if stopped else "length")
            self.counts["finished"] += 1

    def check_books(self) -> None:
        pool = self.pool
        pool.check()
        owners = Counter()
        for sequence in self.scheduler.running:
            assert sequence.draft_computed <= sequence.computed < len(sequence.tokens)
            assert len(sequence.blocks) <= pool.blocks_for(len(sequence.tokens)), "rejected drafts keep blocks"
            owners.update(sequence.blocks)
            spelled = self.spell(sequence.tokens)
            self.read(self.cells, sequence, spelled, sequence.computed)
            self.read(self.draft_cells, sequence, spelled, sequence.draft_computed)
        assert pool.references == [owners[block] for block in range(pool.num_blocks)]
        assert not any(sequence.blocks or sequence.computed for sequence in self.scheduler.waiting)

    def drain(self) -> None:
        """Work until nothing is left; everything is given back."""
        while self.alive():
            self.step()
        assert self.pool.references == [0] * self.pool.num_blocks
        assert self.pool.available == self.pool.num_blocks
        assert self.scheduler.schedule(no_drafts).work == []
        for samples in self.samples.values():
            ends = {sequence.finish_reason for sequence in samples}
            assert ends <= {"stop", "length", "abort"}
            if "abort" not in ends:
                assert [sequence.index for sequence in samples] == list(range(samples[0].params.n))


def drive(simulation: Simulation, steps: int) -> None:
    """Random arrivals of prompts with common beginnings, aborts between and within steps."""
    rng, context = simulation.rng, simulation.context
    texts = [[rng.randrange(2) for _ in range(context)] for _ in range(3)]
    for _ in range(steps):
        while len(simulation.scheduler.waiting) < 4 and rng.random() < 0.5:
            prompt = rng.choice(texts)[: rng.randint(1, context // 2)]
            prompt = prompt + [rng.randrange(2) for _ in range(rng.choice([0, 0, 1, 4]))]
            max_tokens = rng.randint(0, context // 2 + 8)
            simulation.add(prompt, max_tokens, rng.choice([1, 1, 2, 4]) if max_tokens else 1)
        names = simulation.alive()
        if names and rng.random() < 0.03:
            simulation.abort(rng.choice(names))
        names = simulation.alive()
        simulation.step(rng.choice(names) if names and rng.random() < 0.03 else None)
    simulation.drain()
