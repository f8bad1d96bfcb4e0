"""Packing and mixing: no token is lost, none crosses a document, every prefix holds the mixture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.config import ConfigError
from moe_lm.data.mixture import Mixture, row_shares
from moe_lm.data.packing import IGNORED, count_rows, join_documents, pack_rows, row_windows

END = 0
TOKEN_BYTES = np.arange(1000, dtype=np.int64) % 7
TOKEN_BYTES[END] = 0


def pack(documents, length):
    line = join_documents(documents, END)
    return pack_rows(row_windows(line, np.arange(count_rows(len(line), length)), length), END, TOKEN_BYTES)


def test_a_batch_by_hand():
    batch = pack([[1, 2, 3], [4, 5], [6]], 4)
    # The line is 1 2 3 E 4 5 E 6 E; rows of four overlap by the token that both predict from and to.
    assert batch.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6]]
    assert batch.targets.tolist() == [[2, 3, 0, IGNORED], [5, 0, IGNORED, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert batch.num_targets == 6
    assert batch.num_bytes == 2 + 3 + 0 + 5 + 0 + 0
    assert {t.dtype for t in (batch.tokens, batch.targets, batch.positions, batch.documents)} == {torch.int64}


def test_a_long_document_is_cut_without_losing_a_prediction():
    batch = pack([[1, 2, 3, 4, 5, 6, 7]], 3)
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4], [5, 6, 7], [0, IGNORED, IGNORED]]
    assert batch.positions[1].tolist() == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=20), min_size=1, max_size=12),
    st.integers(2, 17),
)
def test_every_token_but_the_first_of_a_document_is_a_target_once(documents, length):
    batch = pack(documents, length)
    scored = batch.targets != IGNORED
    expected = [token for document in documents for token in [*document[1:], END]]
    assert batch.targets[scored].tolist() == expected
    assert batch.num_targets == len(expected)
    assert batch.num_bytes == TOKEN_BYTES[expected].sum()
    pairs = {pair for document in documents for pair in zip(document, [*document[1:], END], strict=True)}
    assert set(zip(batch.tokens[scored].tolist(), batch.targets[scored].tolist(), strict=True)) <= pairs


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 999), min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(2, 13),
)
def test_positions_and_documents_follow_a_plain_loop(documents, length):
    batch = pack(documents, length)
    for tokens, positions, numbers in zip(batch.tokens, batch.positions, batch.documents, strict=True):
        position = number = 0
        for token, got_position, got_number in zip(tokens, positions, numbers, strict=True):
            assert (got_position, got_number) == (position, number)
            position += 1
            if token == END:
                position, number = 0, number + 1


def test_to_moves_the_tensors_and_keeps_the_counts():
    batch = pack([[1, 2, 3]], 3)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.tokens, moved.targets, moved.positions, moved.documents)} == {"meta"}
    assert (moved.num_targets, moved.num_bytes) == (batch.num_targets, batch.num_bytes)


def test_shares_are_epochs_times_tokens():
    assert row_shares([2, 4], [100, 100]) == [1 / 3, 2 / 3]
    assert row_shares([2, 4], [600, 100]) == [0.75, 0.25]
    assert row_shares([1, 3], [None, None]) == [0.25, 0.75]
    with pytest.raises(ConfigError, match=r"1 of 2 data\.sources have streaming = true"):
        row_shares([1, 1], [None, 5])


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.14, 0.86], [0.7, 0.2, 0.1], [0.01, 0.33, 0.33, 0.33]])
def test_every_prefix_holds_the_mixture(shares):
    order = Mixture(shares).take(1000)
    counts = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)
    exact = np.arange(1, 1001)[:, None] * np.array(shares)
    assert np.abs(counts - exact).max() < 1 + 1e-6
    resumed = Mixture(shares)
    resumed.load(counts[332].tolist())
    assert resumed.take(667).tolist() == order[333:].tolist()


def test_a_saved_mixture_of_other_sources_is_refused():
    with pytest.raises(ConfigError, match=r"2 data\.sources and this one 1"):
        Mixture([1.0]).load([3, 4])
