"""What the tests of the data loaders compare."""

from itertools import pairwise

import torch


def documents_of(data, split):
    starts = split.starts.tolist()
    parts = [split.tokens[a:b].tolist() for a, b in pairwise(starts)]
    assert all(part[-1] == 0 and 0 not in part[:-1] for part in parts)
    return [data.tokenizer.decode(part) for part in parts]


def same(a, b):
    names = ("tokens", "targets", "positions", "documents")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.num_bytes == b.num_bytes
