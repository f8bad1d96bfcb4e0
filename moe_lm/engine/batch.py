"""One step's flat batch: every sequence brings one or more new tokens, after each other without padding.

N new tokens, S sequences, W pages of the longest, R rows whose logits are wanted, P tokens of a page.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """What one sequence brings to a step."""

    tokens: list[int]
    """New tokens, one or more."""
    start: int
    """Position of the first."""
    blocks: list[int]
    """Pages of the sequence in order, with room for the new tokens."""
    wanted: int
    """Logits are wanted after each of this many last tokens."""


class Batch(NamedTuple):
    """A step as the model takes it, all int64."""

    tokens: Tensor
    """(N,)."""
    positions: Tensor
    """(N,)."""
    slots: Tensor
    """(N,) where keys and values go, page * P + row."""
    page_table: Tensor
    """(S, W)."""
    query_offsets: Tensor
    """(S + 1,): sequence s brings tokens query_offsets[s] to query_offsets[s + 1]."""
    lengths: Tensor
    """(S,) tokens in the cache after the step."""
    rows: Tensor
    """(R,) rows whose logits are wanted."""
    whole: Tensor
    """All of these after each other."""

    @property
    def inputs(self) -> Tensor:
        """All that the model's states depend on, which is all but `rows`, after each other."""
        return self.whole[: len(self.whole) - len(self.rows)]


def parts(whole: Tensor, tokens: int, sequences: int, pages: int) -> Batch:
    """The batch that `whole` is, or with no rows its `inputs`."""
    sizes = [tokens, tokens, tokens, sequences * pages, sequences + 1, sequences]
    *found, rows = whole.split([*sizes, len(whole) - sum(sizes)])
    found[3] = found[3].view(sequences, pages)
    return Batch(*found, rows, whole)


class Size(NamedTuple):
    """What a step's tensors are filled up to."""

    tokens: int
    """New tokens. Those that are missing repeat the last one, each as a sequence of its own, and leave no trace in the
    cache: they choose the experts that the last one does."""
    sequences: int
    """Sequences, the missing ones without a token: at least those that there are and one for each token repeated."""
    pages: int
    """Of the longest sequence."""


def build(pieces: list[Piece], page_size: int, device: torch.device, size: Size | None = None) -> Batch:
    """A step's tensors, filled up to `size`."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    offsets = [0]
    for piece in pieces:
        n, start, blocks = len(piece.tokens), piece.start, piece.blocks
        tokens += piece.tokens
        positions += range(start, start + n)
        slots += places(blocks, page_size, start, start + n)
        offsets.append(offsets[-1] + n)
        rows += range(offsets[-1] - piece.wanted, offsets[-1])
    lengths = [piece.start + len(piece.tokens) for piece in pieces]
    width = pages_of(lengths, page_size) if size is None else size.pages
    table: list[int] = []
    for piece in pieces:
        table += piece.blocks[:width]
        table += [0] * (width - len(piece.blocks))
    if size is not None:
        spare = size.tokens - len(tokens)
        empty = size.sequences - len(pieces) - spare
        table += table[-width:] * spare + [0] * (empty * width)
        offsets += [*range(offsets[-1] + 1, size.tokens + 1), *[size.tokens] * empty]
        lengths += [positions[-1] + 1] * spare + [0] * empty
        tokens += tokens[-1:] * spare
        positions += positions[-1:] * spare
        slots += [-1] * spare
    lists = (tokens, positions, slots, table, offsets, lengths, rows)
    # One tensor and its parts: seven small ones take three times as long.
    return parts(to_device(list(chain(*lists)), device), len(tokens), len(lengths), width)


def pages_of(lengths: list[int], page_size: int) -> int:
    """Pages of the longest sequence."""
    return -(-max(lengths) // page_size)


def places(blocks: list[int], page_size: int, start: int, end: int) -> list[int]:
    """The slots of a sequence's positions start to end - 1."""
    slots: list[int] = []
    for i in range(start // page_size, -(-end // page_size)):
        # The slot of position p in the i-th block is p plus a constant.
        shift = (blocks[i] - i) * page_size
        slots.extend(range(max(start, i * page_size) + shift, min(end, (i + 1) * page_size) + shift))
    return slots


def to_device(values: list, device: torch.device) -> Tensor:
    """An int64 tensor of them; to a GPU through pinned memory, so that the host does not wait for the copy."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def passes(pieces: list[Piece], rows: int) -> Iterator[list[Piece]]:
    """The same tokens in passes of at most `rows` rows, in order: a piece may go on in the next pass."""
    group: list[Piece] = []
    room = rows
    for piece in pieces:
        tokens, start, _, wanted = piece
        done = 0
        while done < len(tokens):
            n = min(room, len(tokens) - done)
            left = len(tokens) - done - n
            group.append(Piece(tokens[done : done + n], start + done, piece.blocks, max(0, min(n, wanted - left))))
            done, room = done + n, room - n
            if not room:
                yield group
                group, room = [], rows
    if group:
        yield group
