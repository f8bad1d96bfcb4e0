"""The scheduler: each of its promises by example, then thousands of random steps against a model of the cache."""

import random

import pytest
from cache_model import Simulation, drive, make, no_drafts, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lm.config import ConfigError
from moe_lm.engine.batch import places
from moe_lm.engine.scheduler import ContextError, Plan, Scheduler
from moe_lm.engine.sequence import Status


def step(scheduler: Scheduler, drafts=0, accepted=0) -> Plan:
    """A step in which `accepted` of the drafts stand; whoever has all tokens is finished."""
    plan = scheduler.schedule(lambda sequence: drafts)
    for work in plan.work:
        scheduler.advance(work, [7] * (min(accepted, work.drafts) + 1) if work.samples else [])
        if not work.sequence.remaining and work.sequence.computed >= work.sequence.prompt_length:
            scheduler.finish(work.sequence, "length")
    return plan


def shape(plan: Plan) -> list[tuple[str, int, int, int]]:
    return [(work.sequence.request_id, work.start, work.count, work.drafts) for work in plan.work]


def test_admission_is_first_come_first_served():
    scheduler = make(blocks=6, sequences=2)
    scheduler.add([request("a", 5), request("b", 16), request("c", 4), request("d", 4)])
    # b does not fit beside a; c and d would, but they came later.
    assert shape(step(scheduler)) == [("a", 0, 5, 0)]
    assert shape(step(scheduler)) == [("a", 5, 1, 0)]
    for _ in range(6):
        step(scheduler)
    assert shape(step(scheduler)) == [("b", 0, 16, 0), ("c", 0, 4, 0)]
    assert [sequence.request_id for sequence in scheduler.waiting] == ["d"]


def test_no_more_run_than_max_sequences():
    scheduler = make(sequences=3)
    scheduler.add([request(name, 2) for name in "abcde"])
    assert [name for name, *_ in shape(step(scheduler))] == ["a", "b", "c"]


def test_a_long_prompt_is_read_in_chunks_beside_decodes():
    scheduler = make(blocks=32, tokens=10)
    scheduler.add([request("a", 3), request("b", 20)])
    assert shape(step(scheduler)) == [("a", 0, 3, 0), ("b", 0, 7, 0)]
    plan = scheduler.schedule(no_drafts)
    assert shape(plan) == [("a", 3, 1, 0), ("b", 7, 9, 0)]
    assert [work.samples for work in plan.work] == [True, False]
    scheduler.advance(plan.work[0], [7])
    scheduler.advance(plan.work[1], [])
    plan = scheduler.schedule(no_drafts)
    assert shape(plan) == [("a", 4, 1, 0), ("b", 16, 4, 0)]
    assert [work.samples for work in plan.work] == [True, True]


def test_prefills_of_older_sequences_do_not_starve_decodes():
    scheduler = make(blocks=64, tokens=8, sequences=8)
    old, young = request("a", 100), request("b", 2)
    scheduler.add([young])
    step(scheduler)
    scheduler.add([old])
    step(scheduler)
    scheduler.running.reverse()  # as if it had come first
    assert shape(step(scheduler)) == [("b", 3, 1, 0), ("a", 7, 7, 0)]


def test_drafts_starve_neither_decodes_nor_prefills_nor_admissions():
    scheduler = make(blocks=64, tokens=8, sequences=4)
    scheduler.add([request("a", 2, 50), request("b", 2, 50), request("c", 30, 50), request("d", 2)])
    step(scheduler)
    assert shape(step(scheduler, drafts=9)) == [("a", 2, 1, 4), ("b", 2, 1, 0), ("c", 4, 2, 0)]
    scheduler.abort("c")
    scheduler.abort("a")
    # b decodes with what d's first token leaves.
    assert shape(step(scheduler, drafts=9)) == [("b", 3, 1, 6), ("d", 0, 1, 0)]


def test_drafts_are_cut_to_what_max_tokens_leaves():
    scheduler = make()
    scheduler.add([request("a", 4, max_tokens=6)])
    step(scheduler)
    assert shape(step(scheduler, drafts=9)) == [("a", 4, 1, 4)]  # the draft's 4 and the one after them
    assert shape(step(scheduler, drafts=9, accepted=2)) == [("a", 5, 1, 3)]
    assert shape(step(scheduler, drafts=9)) == [("a", 8, 1, 0)]
    assert not scheduler.running


def test_drafts_are_cut_to_free_blocks_and_never_preempt():
    scheduler = make(blocks=4)
    scheduler.add([request("a", 3, 13), request("b", 3, 13)])
    step(scheduler)
    # Each has its slot in its own block; a guesses into the two free ones, nothing is left for b.
    plan = scheduler.schedule(lambda sequence: 16)
    assert shape(plan) == [("a", 3, 1, 8), ("b", 3, 1, 0)]
    assert not plan.preempted
    assert scheduler.pool.available == 0
    for work in plan.work:
        scheduler.advance(work, [7])
    # Rejected drafts give their blocks back, but for the one that the last token lies in.
    assert [len(sequence.blocks) for sequence in scheduler.running] == [2, 1]
    assert not scheduler.schedule(no_drafts).preempted


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = make(blocks=5)
    a, b, c = request("a", 3, 9), request("b", 3, 12), request("c", 5, 12)
    scheduler.add([a, b])
    step(scheduler)
    scheduler.add([c])
    for _ in range(5):
        assert not step(scheduler).preempted
    # The next token of each wants a third block and one is left: b is the youngest that runs.
    assert (len(a.blocks), len(b.blocks), scheduler.pool.available, c.status) == (2, 2, 1, Status.WAITING)
    plan = step(scheduler)
    assert (shape(plan), plan.preempted) == ([("a", 8, 1, 0)], [b])
    assert (b.status, b.preemptions, b.computed, b.draft_computed, b.blocks) == (Status.WAITING, 1, 0, 0, [])
    assert len(b.tokens) == 9
    assert list(scheduler.waiting) == [b, c]
    while a.status is Status.RUNNING:
        step(scheduler)
    plan = step(scheduler)
    # Its two full blocks were still to be found.
    assert shape(plan)[0] == ("b", 8, 1, 0)
    assert b.cached == 8
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert [len(sequence.output) for sequence in (a, b, c)] == [9, 12, 12]


def test_who_was_preempted_does_not_come_back_in_the_same_step():
    scheduler = make(blocks=5)
    a, b = request("a", list(range(8))), request("b", list(range(8)))
    scheduler.add([a, b])
    step(scheduler)
    # a takes the last block; b, whose own blocks repeat a's, could share those and go on at once.
    plan = step(scheduler)
    assert (shape(plan), plan.preempted, list(scheduler.waiting)) == ([("a", 8, 1, 0)], [b], [b])
    assert shape(step(scheduler)) == [("a", 9, 1, 0), ("b", 8, 1, 0)]
    assert b.blocks[:2] == a.blocks[:2]


def test_an_older_sequence_takes_from_several_younger_ones():
    scheduler = make(blocks=4, prefix_cache=False)
    old, shared = request("a", 4, 12), request("b", 3, n=3)
    scheduler.add([old, shared])
    step(scheduler)
    scheduler.fork(shared, 2)
    scheduler.schedule(no_drafts)
    # b and its first child copied b's block, the other child owns it now: to free one block takes one of them.
    assert [len(sequence.blocks) for sequence in scheduler.running] == [2, 1, 1]
    assert [sequence.preemptions for sequence in scheduler.waiting] == [1]


def test_admission_leaves_each_running_sequence_a_block():
    scheduler = make(blocks=6)
    scheduler.add([request("a", 4), request("b", 4), request("c", 9)])
    assert shape(step(scheduler)) == [("a", 0, 4, 0), ("b", 0, 4, 0)]  # c would leave one block for two
    scheduler = make(blocks=7)
    scheduler.add([request("a", 4), request("b", 4), request("c", 9)])
    assert len(step(scheduler).work) == 3


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 4, "the prompt is empty; give at least one token, such as the end-of-text token."),
        (60, 5, "60 tokens of prompt and max_tokens = 5 make 65, more than the context of 64; "
                "shorten the prompt or lower max_tokens."),
        (21, 0, "21 tokens of prompt and max_tokens = 0 need 6 cache blocks of 4 tokens, more than the 5 that "
                "kv_memory holds; lower max_tokens or raise kv_memory."),
        (10, 12, "10 tokens of prompt and max_tokens = 12 need 6 cache blocks of 4 tokens, more than the 5 that "
                 "kv_memory holds; lower max_tokens or raise kv_memory."),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_refused_with_its_numbers(prompt, max_tokens, message):
    scheduler = make(blocks=5, context=64)
    with pytest.raises(ConfigError) as refusal:
        scheduler.add([request("a", 4), request("b", prompt, max_tokens)])
    assert isinstance(refusal.value, ContextError) == (prompt > 0)
    assert str(refusal.value) == message
    assert not scheduler.waiting


def test_what_just_fits_is_served():
    scheduler = make(blocks=5, context=21)
    scheduler.add([request("a", 10, 11), request("b", 20, 1), request("c", 20, 0)])
    while scheduler.running or scheduler.waiting:
        assert step(scheduler, drafts=4).work
    assert scheduler.pool.available == 5


def test_a_prompt_alone_is_computed_in_any_chunks_and_gives_no_token():
    scheduler = make(tokens=4, sequences=2)
    scheduler.add([request("a", 2), request("b", 3, 0), request("c", 1, 0)])
    assert shape(step(scheduler)) == [("a", 0, 2, 0), ("b", 0, 2, 0)]
    # The rest of b is one token, beside those that decode, and guesses nothing.
    plan = scheduler.schedule(lambda sequence: 3)
    assert shape(plan) == [("a", 2, 1, 2), ("b", 2, 1, 0)]
    assert [work.samples for work in plan.work] == [True, False]
    for work in plan.work:
        scheduler.advance(work, [7] if work.samples else [])
    scheduler.finish(plan.work[1].sequence, "length")
    assert scheduler.unstarted() == {"c"}
    plan = step(scheduler)
    assert shape(plan) == [("a", 3, 1, 0), ("c", 0, 1, 0)]
    assert [sequence.request_id for sequence in plan.started] == ["c"]
    assert len(scheduler.running) == 1


def test_a_step_must_hold_all_running_sequences():
    with pytest.raises(ConfigError, match="max_step_tokens = 7 must be at least max_sequences = 8, one token"):
        make(tokens=7)
    with pytest.raises(ConfigError, match="max_sequences = 0 must be at least 1"):
        make(sequences=0)


def test_hits_spare_computation_and_only_final_tokens_are_found():
    scheduler = make(blocks=32)
    tokens = list(range(10))
    first = request("a", tokens, 9)
    scheduler.add([first])
    step(scheduler)
    plan = scheduler.schedule(lambda sequence: 6)
    assert plan.work[0].drafts == 6
    # Drafted slots fill blocks, but of the drafts only 50 and 51 stood: the next full block ends with 51.
    scheduler.advance(plan.work[0], [50, 51, 52])
    second, third = request("b", [*tokens, 7, 50, 51, 52]), request("c", [*tokens, 7, 50, 60, 60, 60])
    assert scheduler.pool.match(second.tokens) == first.blocks[:3]
    scheduler.add([second, third])
    assert shape(step(scheduler))[1:] == [("b", 12, 2, 0), ("c", 12, 3, 0)]
    assert (second.cached, third.cached) == (12, 12)
    assert (scheduler.pool.hits, scheduler.pool.lookups) == (24, 10 + 14 + 15)


def test_who_wants_logprobs_of_the_prompt_computes_all_of_it():
    scheduler = make()
    tokens = list(range(9))
    scheduler.add([request("a", tokens, 1)])
    step(scheduler)
    first = request("b", tokens, n=2, prompt_logprobs=0)
    scheduler.add([first])
    assert shape(step(scheduler)) == [("b", 0, 9, 0)]
    assert (first.cached, scheduler.pool.hits, scheduler.pool.lookups) == (0, 0, 9)
    # Its other samples share the prompt, and it may reuse it itself once its output has begun.
    [child] = scheduler.fork(first, 1)
    assert (child.computed, child.needs_whole_prompt, first.needs_whole_prompt) == (8, False, False)


def test_draft_positions_follow_hits_forks_and_rejections():
    scheduler = make(blocks=32)
    first = request("a", list(range(9)), n=2)
    scheduler.add([first])
    plan = scheduler.schedule(no_drafts)
    first.draft_computed = 9
    scheduler.advance(plan.work[0], [7])
    [child] = scheduler.fork(first, 1)
    assert (child.computed, child.draft_computed) == (8, 8)
    plan = scheduler.schedule(lambda sequence: 3)
    first.draft_computed = 12  # the last token and the first two drafts
    scheduler.advance(plan.work[0], [7])
    assert (first.computed, first.draft_computed) == (10, 10)
    second = request("b", list(range(12)))
    scheduler.add([second])
    scheduler.advance(plan.work[1], [7])
    step(scheduler)
    assert (second.cached, second.draft_computed) == (8, 8)


def test_forks_share_and_the_first_writers_copy():
    scheduler = make(blocks=16, prefix_cache=False)
    first = request("a", 6, n=3)
    scheduler.add([first, request("z", 2)])
    step(scheduler)
    shared = list(first.blocks)
    children = scheduler.fork(first, 2)
    assert [(child.index, child.computed, child.blocks) for child in children] == [(1, 5, shared), (2, 5, shared)]
    assert scheduler.running[:3] == [first, *children]
    assert scheduler.pool.references[shared[1]] == 3
    plan = step(scheduler)
    assert shape(plan) == [("a", 6, 1, 0), ("a", 5, 1, 0), ("a", 5, 1, 0), ("z", 2, 1, 0)]
    assert plan.copies == [(shared[1], first.blocks[1]), (shared[1], children[0].blocks[1])]
    assert children[1].blocks == shared  # the last owner writes where it is
    assert scheduler.pool.references[shared[0]] == 3
    assert step(scheduler).copies == []


def test_children_share_no_block_that_begins_with_the_prompts_last_token():
    scheduler = make()
    first = request("a", 9, n=2)
    scheduler.add([first])
    step(scheduler)
    [child] = scheduler.fork(first, 1)
    assert child.blocks == first.blocks[:2]
    assert step(scheduler).copies == []


def test_a_child_that_writes_into_a_full_block_withdraws_it():
    scheduler = make(blocks=16)
    first = request("a", list(range(8)), n=2)
    scheduler.add([first])
    step(scheduler)
    [child] = scheduler.fork(first, 1)
    scheduler.finish(first, "stop")
    same = request("b", list(range(9)))
    scheduler.add([same])
    # The child computes the prompt's last token again, in its place: b must not read that block meanwhile.
    plan = step(scheduler)
    assert (shape(plan), plan.copies) == ([("a", 7, 1, 0), ("b", 4, 5, 0)], [])
    assert scheduler.pool.match(same.tokens) == child.blocks[:2]


def test_forks_without_room_wait_in_front_and_find_the_prompt():
    scheduler = make(sequences=2)
    first = request("a", 9, 1, n=3)
    scheduler.add([first, request("z", 2)])
    plan = scheduler.schedule(no_drafts)
    scheduler.advance(plan.work[0], [7])
    scheduler.advance(plan.work[1], [7])
    scheduler.add([request("y", 2)])
    children = scheduler.fork(first, 2)
    scheduler.finish(first, "length")
    assert list(scheduler.waiting)[:2] == children
    assert [child.status for child in children] == [Status.WAITING] * 2
    assert shape(step(scheduler)) == [("z", 2, 1, 0), ("a", 8, 1, 0)]
    assert children[0].cached == 8


def test_a_sequence_can_be_aborted_in_every_state():
    scheduler = make(sequences=2)
    first = request("a", 5, n=3)
    scheduler.add([first, request("b", 5), request("c", 5)])
    step(scheduler)
    assert scheduler.abort("nobody") == []
    [waiting] = scheduler.abort("c")
    assert (waiting.status, waiting.finish_reason) == (Status.FINISHED, "abort")
    plan = scheduler.schedule(lambda sequence: 2)
    [running] = scheduler.abort("b")  # in the middle of a step
    assert running.blocks == []
    assert [work.sequence.status for work in plan.work] == [Status.RUNNING, Status.FINISHED]
    with pytest.raises(AssertionError, match="b is finished"):
        scheduler.advance(plan.work[1], [7])
    scheduler.advance(plan.work[0], [7])
    children = scheduler.fork(first, 2)
    assert [child.status for child in children] == [Status.RUNNING, Status.WAITING]
    assert scheduler.abort("a") == [first, *children]
    assert scheduler.pool.available == scheduler.pool.num_blocks
    assert step(scheduler).work == []
    with pytest.raises(AssertionError, match="a has finished: abort"):
        scheduler.finish(first, "length")


def test_nothing_of_a_failed_step_is_found():
    scheduler = make(tokens=8)
    sequence = request("a", list(range(13)))
    scheduler.add([sequence])
    step(scheduler)
    scheduler.schedule(no_drafts)
    scheduler.finish(sequence, "error")
    assert len(scheduler.pool.match(sequence.tokens)) == 2  # of the step that was booked
    scheduler.pool.check()
    assert scheduler.pool.available == scheduler.pool.num_blocks


def test_a_step_is_booked_once_and_with_as_many_tokens_as_it_can_give():
    scheduler = make(tokens=8)
    scheduler.add([request("a", 9)])
    plan = scheduler.schedule(no_drafts)
    with pytest.raises(AssertionError, match="1 new tokens after 0 drafts"):
        scheduler.advance(plan.work[0], [7])  # a chunk in the middle of a prompt
    scheduler.advance(plan.work[0], [])
    with pytest.raises(AssertionError, match="computed 8 tokens, the work began at 0"):
        scheduler.advance(plan.work[0], [])
    plan = scheduler.schedule(lambda sequence: 2)
    for tokens in ([], [7] * 4):
        with pytest.raises(AssertionError, match=f"{len(tokens)} new tokens after 2 drafts"):
            scheduler.advance(plan.work[0], tokens)


def test_slots_are_block_times_size_plus_offset():
    blocks = [7, 2, 9, 0, 5]
    assert places(blocks, 3, 0, 14) == [21, 22, 23, 6, 7, 8, 27, 28, 29, 0, 1, 2, 15, 16]
    for start in range(14):
        for end in range(start, 15):
            expected = [blocks[p // 3] * 3 + p % 3 for p in range(start, end)]
            assert places(blocks, 3, start, end) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32), blocks=st.integers(1, 30), size=st.integers(1, 5), sequences=st.integers(1, 6),
    more_tokens=st.integers(0, 30), context=st.integers(4, 50), prefix_cache=st.booleans(),
)  # fmt: skip
def test_any_shape_serves_any_load(seed, more_tokens, sequences, **shape):
    simulation = Simulation(random.Random(seed), tokens=sequences + more_tokens, sequences=sequences, **shape)
    drive(simulation, 60)


@pytest.mark.parametrize("blocks", [10, 14, 24, 60])
def test_thousands_of_steps_with_every_event(blocks):
    simulation = Simulation(random.Random(blocks), blocks=blocks, size=4, tokens=16, sequences=6, context=48)
    drive(simulation, 2500)
    counts, pool = simulation.counts, simulation.pool
    events = ("finished", "refused", "aborted", "copies", "chunks", "mixed", "accepted", "rejected", "prompts alone")
    for event in events:
        assert counts[event] > 5, (event, counts)
    assert counts["preempted"] > 5 or blocks == 60, counts
    assert pool.evictions > 100
    assert pool.lookups > pool.hits > 1000
