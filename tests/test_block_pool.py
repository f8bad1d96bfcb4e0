"""The block pool: reference counts, what the prefix cache finds, and what it forgets first."""

import random

import pytest

from moe_lm.engine import block_pool
from moe_lm.engine.block_pool import BlockPool


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks with one owner that hold `tokens`, registered."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    pool.register(blocks, tokens, len(tokens))
    return blocks


def test_a_block_is_free_when_its_last_owner_leaves():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert len(set(blocks)) == 2
    assert pool.available == 2
    pool.acquire(blocks)
    assert not pool.writable(blocks[0])
    pool.release(blocks)
    assert pool.writable(blocks[0])
    assert pool.available == 2
    pool.release(blocks)
    assert pool.available == 4
    pool.check()


def test_misuse_is_caught():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released once too often"):
        pool.release(blocks)


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (100, 3)])
def test_a_match_leaves_one_token_to_compute(length, found):
    pool = BlockPool(8, block_size=4)
    blocks = fill(pool, list(range(12)))
    assert pool.match(list(range(length))) == blocks[:found]


def test_only_full_computed_blocks_are_found():
    pool = BlockPool(8, block_size=4)
    tokens = list(range(20))
    blocks = pool.allocate(5)
    for computed, found in ((3, 0), (4, 1), (7, 1), (11, 2), (20, 4)):
        pool.register(blocks, tokens, computed)
        assert pool.match(tokens) == blocks[:found]
    pool.check()


def test_the_same_tokens_after_others_are_another_block():
    pool = BlockPool(8, block_size=2)
    first = fill(pool, [1, 2, 9, 9])
    second = fill(pool, [3, 4, 9, 9])
    assert pool.match([1, 2, 9, 9, 0]) == first
    assert pool.match([3, 4, 9, 9, 0]) == second
    assert pool.match([9, 9, 0]) == []


def test_texts_whose_hash_collides_are_told_apart():
    # hash(-1) == hash(-2), so tuples of them collide: a table by Python's hash would mix them up.
    assert hash((-1, -1)) == hash((-2, -2))
    pool = BlockPool(8, block_size=2)
    fill(pool, [-1, -1])
    assert pool.match([-2, -2, 0]) == []


def test_one_text_has_one_key_and_each_change_another():
    rng = random.Random(0)
    keys = {}
    for _ in range(2000):
        parent, tokens = rng.choice([b"a", b"b"]), tuple(rng.randrange(3) for _ in range(4))
        assert keys.setdefault((parent, tokens), key := block_pool.block_key(parent, list(tokens))) == key
    assert len(set(keys.values())) == len(keys) == 2 * 3**4


def test_of_two_blocks_with_one_content_the_first_is_found():
    pool = BlockPool(6, block_size=2)
    tokens = [1, 2, 3, 4]
    first, second = fill(pool, tokens), fill(pool, tokens)
    assert pool.match([*tokens, 5]) == first
    pool.release(second)
    assert pool.match([*tokens, 5]) == first
    pool.check()
    # Of no use any more, the second one's blocks go before those that could be found or were never used.
    assert set(pool.allocate(2)) == set(second)
    assert pool.evictions == 0


def test_a_duplicate_is_found_when_the_first_is_gone():
    pool = BlockPool(4, block_size=2)
    tokens = [1, 2, 3, 4]
    first, second = fill(pool, tokens), fill(pool, tokens)
    pool.release(first)
    pool.allocate(2)
    assert pool.match([*tokens, 5]) == []
    pool.release(second)
    assert pool.match([*tokens, 5]) == second
    pool.check()


def test_the_least_recently_released_is_evicted_first():
    pool = BlockPool(6, block_size=2)
    old, middle, new = (fill(pool, [i, i]) for i in range(3))
    for blocks in (old, new, middle):
        pool.release(blocks)
    assert pool.allocate(3) == [3, 4, 5]  # never used
    assert pool.evictions == 0
    assert [pool.allocate(1) for _ in range(3)] == [old, new, middle]
    assert pool.evictions == 3


def test_a_use_makes_recent():
    pool = BlockPool(2, block_size=2)
    a, b = fill(pool, [1, 1]), fill(pool, [2, 2])
    pool.release(a)
    pool.release(b)
    pool.acquire(pool.match([1, 1, 0]))
    pool.release(a)
    assert pool.allocate(2) == [*b, *a]


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    pool = BlockPool(4, block_size=2)
    blocks = fill(pool, list(range(7)))  # the last one is partly filled and cannot be found
    pool.release(blocks)
    for left in (3, 2, 1, 0):
        [evicted] = pool.allocate(1)
        assert evicted == blocks[left]
        assert pool.match(list(range(7))) == blocks[:left]
        pool.check()
    assert pool.evictions == 3


def test_admission_takes_hits_and_counts_them():
    pool = BlockPool(8, block_size=2)
    tokens = list(range(6))
    blocks = fill(pool, tokens)
    assert pool.admit([*tokens, 7, 8, 9]) == ([*blocks, 3, 4], 6)
    assert [pool.references[block] for block in blocks] == [2, 2, 2]
    assert (pool.hits, pool.lookups) == (6, 9)
    assert pool.admit([9, 9, 9])[1] == 0
    assert (pool.hits, pool.lookups) == (6, 12)
    pool.check()


def test_admission_that_does_not_fit_changes_nothing():
    pool = BlockPool(4, block_size=2)
    blocks = fill(pool, list(range(4)))
    pool.release(blocks)
    # Two found blocks are free themselves: with one new block three of the four are taken.
    assert pool.admit([*range(4), 9], spare=2) is None
    assert (pool.available, pool.hits, pool.lookups, pool.references) == (4, 0, 0, [0] * 4)
    pool.check()
    assert pool.admit([*range(4), 9], spare=1)[1] == 4
    assert pool.available == 1
    # Found blocks that others hold cost nothing.
    assert pool.admit([*range(4), 8])[1] == 4
    assert pool.available == 0


def test_a_claimed_block_is_not_found_until_it_is_registered_again():
    pool = BlockPool(4, block_size=2)
    tokens = [1, 2, 3, 4]
    blocks = fill(pool, tokens)
    pool.acquire(blocks[1:])
    assert not pool.claim(blocks[1])
    assert pool.match([*tokens, 5]) == blocks
    pool.release(blocks[1:])
    assert pool.claim(blocks[1])
    assert pool.match([*tokens, 5]) == blocks[:1]
    pool.check()
    pool.register(blocks, tokens, 4)
    assert pool.match([*tokens, 5]) == blocks
    pool.check()


def test_without_a_prefix_cache_nothing_is_found():
    pool = BlockPool(4, block_size=2, prefix_cache=False)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4, 5]) == []
    pool.release(blocks)
    assert pool.admit([1, 2, 3, 4, 5])[1] == 0
    pool.check()


def test_a_reset_forgets_what_is_free_and_what_is_in_use():
    pool = BlockPool(8, block_size=2)
    tokens = list(range(8))
    free = fill(pool, [9, 9])
    pool.release(free)
    used = pool.allocate(4)
    pool.register(used, tokens, 4)
    pool.reset_prefix_cache()
    pool.check()
    assert pool.match([9, 9, 0]) == []
    # Its owner goes on; the rest of its chain was computed after blocks that must not be found.
    pool.register(used, tokens, 8)
    assert pool.match([*tokens, 0]) == []
    # Nor does a new chain with the same beginning lead to it.
    fresh = pool.allocate(2)
    pool.register(fresh, tokens, 4)
    assert pool.match([*tokens, 0]) == fresh
    pool.release(used)
    assert pool.match([*tokens, 0]) == fresh
    pool.check()


def test_draft_marks_cover_full_blocks_and_go_with_the_content():
    pool = BlockPool(4, block_size=2)
    tokens = list(range(8))
    blocks = fill(pool, tokens)
    pool.mark_drafted(blocks, 5)
    assert pool.drafted(blocks) == 4
    pool.mark_drafted(blocks, 8)
    assert pool.drafted(blocks) == 8
    pool.release(blocks)
    assert pool.drafted(pool.match([*tokens, 9])) == 8
    [evicted] = pool.allocate(1)
    assert evicted == blocks[3]
    assert not pool.draft_ready[evicted]
    assert pool.drafted(blocks) == 6


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_the_books(seed):
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(1, 12), block_size=rng.randint(1, 4))
    chains = []
    for _ in range(300):
        if chains and rng.random() < 0.5:
            pool.release(chains.pop(rng.randrange(len(chains))))
        elif admitted := pool.admit(tokens := [rng.randrange(2) for _ in range(rng.randint(1, 16))]):
            blocks, cached = admitted
            # A found block is still what was registered under it: full, and the same from the start of the text on.
            pool.register(blocks, tokens, rng.randint(cached, len(tokens)))
            chains.append(blocks)
        pool.check()
        assert sum(pool.references) == sum(map(len, chains))
    for blocks in chains:
        pool.release(blocks)
    assert pool.available == pool.num_blocks
    pool.check()
