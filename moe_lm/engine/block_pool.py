"""Which blocks of the paged key-value cache are in use, by how many, and what they hold. No tensor is touched here.

A block is room for `block_size` tokens in every layer (PagedAttention, Kwon et al. 2023). A full block is found again
by its key, a SHA-256 over the key of the block before it and its own tokens: equal keys mean equal tokens from the
start of the text on, as nobody knows two texts with one SHA-256. Python's own hash() of a tuple would not do: two
texts with the same one are easily made, and one request would read another's cache.
"""

from array import array
from collections import OrderedDict
from hashlib import sha256


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens with reference counts, and the prefix cache over them.

    A block that nobody references is free. If it holds a full block of known tokens it can still be found, and used
    again, until it is allocated for something else: the least recently released one first. `prefix_cache=False` finds
    nothing.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, prefix_cache: bool = True):
        assert num_blocks > 0, f"num_blocks = {num_blocks}"
        assert block_size > 0, f"block_size = {block_size}"
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.references = [0] * num_blocks
        self.draft_ready = [False] * num_blocks
        """Per block: whether the draft model's keys and values of all its tokens are valid too."""
        self.hits = 0
        """Tokens found in the prefix cache by admissions, those after a preemption included."""
        self.lookups = 0
        """Tokens that admissions looked for."""
        self.evictions = 0
        """Findable blocks that were forgotten to make room."""
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to be allocated first
        self._keys: list[bytes | None] = [None] * num_blocks  # of full blocks; two of the same content have the same
        self._findable: dict[bytes, int] = {}
        self._resets = 0

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, those that could still be found included."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Free blocks that could still be found. Counts them."""
        return sum(self._keys[block] is not None for block in self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def writable(self, block: int) -> bool:
        """Whether it has one owner, who may claim it; a shared block has to be copied before it is written."""
        return self.references[block] == 1

    def claim(self, block: int) -> bool:
        """Take a block for writing, if it is not shared; it is not found any more until it is registered again."""
        if self.references[block] != 1:
            return False
        if self._keys[block] is not None:
            self._forget(block)
        return True

    def match(self, tokens: list[int]) -> list[int]:
        """The longest chain of findable blocks that hold the beginning of `tokens`; nothing is acquired.

        It covers at most len(tokens) - 1 of them: the last token has to be computed to know what follows it.
        """
        size, blocks, key = self.block_size, [], self._root()
        for start in range(0, (len(tokens) - 1) // size * size, size):
            key = block_key(key, tokens[start : start + size])
            if (block := self._findable.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def admit(self, tokens: list[int], spare: int = 0, reuse: bool = True) -> tuple[list[int], int] | None:
        """Blocks for all of `tokens`, acquired, and how many of the tokens they hold already: 0 without `reuse`.

        None, with nothing changed, if fewer than `spare` blocks would be left.
        """
        found = self.match(tokens) if reuse else []
        fresh = self.blocks_for(len(tokens)) - len(found)
        revived = sum(self.references[block] == 0 for block in found)
        if fresh + revived + spare > self.available:
            return None
        cached = len(found) * self.block_size
        self.lookups += len(tokens) if reuse else 0
        self.hits += cached
        self.acquire(found)
        return found + self.allocate(fresh), cached

    def allocate(self, n: int) -> list[int]:
        """n blocks of unknown content for one owner, which must be available. What was to be found in them is not."""
        assert 0 <= n <= self.available, f"{n} blocks wanted, {self.available} available"
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            self.references[block] = 1
            self.draft_ready[block] = False
            self.evictions += self._forget(block)
        return blocks

    def acquire(self, blocks: list[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            if self.references[block] == 0:
                del self._free[block]
            self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner less for each of a chain's blocks, given in order of position.

        The end of the chain is evicted before its beginning, which is of use to more texts. Blocks that could not be
        found, or hold what another block is found for, are allocated before all that could.
        """
        for block in reversed(blocks):
            assert self.references[block] > 0, f"block {block} is released once too often"
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                key = self._keys[block]
                if key is None or self._findable.setdefault(key, block) != block:
                    self._keys[block] = None
                    self._free.move_to_end(block, last=False)

    def register(self, blocks: list[int], tokens: list[int], computed: int) -> None:
        """Make the full blocks among the first `computed` tokens findable; these tokens must be final.

        Of two blocks with the same content the first stays the one that is found.
        """
        if not self.prefix_cache:
            return
        size, full = self.block_size, computed // self.block_size
        first = full
        while first and self._keys[blocks[first - 1]] is None:
            first -= 1
        key = self._keys[blocks[first - 1]] if first else self._root()
        for i in range(first, full):
            key = block_key(key, tokens[i * size : (i + 1) * size])
            self._keys[blocks[i]] = key
            self._findable.setdefault(key, blocks[i])

    def mark_drafted(self, blocks: list[int], draft_computed: int) -> None:
        """Note that the draft model's cache holds the first `draft_computed` tokens; these tokens must be final.

        Goes back from there to the first block that is noted already.
        """
        i = draft_computed // self.block_size
        while i and not self.draft_ready[blocks[i - 1]]:
            i -= 1
            self.draft_ready[blocks[i]] = True

    def drafted(self, blocks: list[int]) -> int:
        """Leading tokens of these blocks that the draft model's cache holds."""
        for i, block in enumerate(blocks):
            if not self.draft_ready[block]:
                return i * self.block_size
        return len(blocks) * self.block_size

    def reset_prefix_cache(self) -> None:
        """Find nothing that was computed until now, as after a change of the weights.

        Blocks in use keep their content for their owners, but neither they nor what follows them is found again: keys
        made from now on start from another root.
        """
        self._resets += 1
        self._findable.clear()
        for block in self._free:
            self._keys[block] = None

    def check(self) -> None:
        """Assert that the books agree with each other; for tests."""
        assert all(count >= 0 for count in self.references)
        assert set(self._free) == {block for block, count in enumerate(self.references) if count == 0}
        for key, block in self._findable.items():
            assert self._keys[block] == key, f"block {block} is found for a key that is not its own"
        for block in self._free:
            key = self._keys[block]
            assert key is None or self._findable.get(key) == block, f"free block {block} has a key but is not found"
        cached = [self._keys[block] is not None for block in self._free]
        assert cached == sorted(cached), "a findable block would be evicted before one that is of no use"

    def _root(self) -> bytes:
        return self._resets.to_bytes(8, "little")

    def _forget(self, block: int) -> bool:
        """Drop the block's key; whether it could be found by it."""
        key, self._keys[block] = self._keys[block], None
        found = key is not None and self._findable.get(key) == block
        if found:
            del self._findable[key]
        return found


def block_key(parent: bytes, tokens: list[int]) -> bytes:
    """The key of a full block of `tokens` that follows the block with key `parent`."""
    return sha256(parent + array("q", tokens).tobytes()).digest()
